// gpu.h on the CUDA runtime, which is linked statically and finds the driver at its first call: on
// a machine without one, nothing happens before that. The primary context of a device is one for
// all runtimes in the process, and so memory and streams of torch's are good here.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "choose_module.h"
#include "embedded.h"
#include "gpu.h"
#include "inflate.h"

namespace fastcell::cuda {
namespace {

std::string device_name(int device) {
  std::string text = "CUDA device " + std::to_string(device);
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    text += std::string(" (") + properties.name + ", " + std::to_string(properties.major) + "." +
            std::to_string(properties.minor) + ")";
  }
  return text;
}

[[noreturn]] void fail(cudaError_t error, int device, const std::string& what) {
  if (error == cudaErrorInsufficientDriver) {
    throw std::runtime_error(
        "the CUDA driver is missing, or older than this build needs: " +
        std::string(CUDART_VERSION < 13000 ? "525.60 (CUDA 12.0)" : "580.65 (CUDA 13.0)"));
  }
  if (error == cudaErrorNoDevice) throw std::runtime_error("the CUDA driver finds no device");
  throw std::runtime_error(device_name(device) + ": " + what + " failed: " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

void check(cudaError_t error, int device, const std::string& what) {
  if (error != cudaSuccess) fail(error, device, what);
}

// --- the current device
// ---------------------------------------------------------------------------

// The driver's functions, which the runtime looks up. Contexts are switched with these and not with
// cudaSetDevice: which device is current, a runtime also remembers for itself, and torch's does not
// tell ours; and to restore a thread that had no context, cudaSetDevice would make one.
class Driver {
 public:
  static const Driver& get() {
    static const Driver driver;  // tried again if it threw
    return driver;
  }

  int (*context)(void** context);
  int (*set_context)(void* context);
  int (*context_device)(int* device);
  int (*device)(int* device, int ordinal);
  int (*primary_context)(void** context, int device);

 private:
  Driver() {
    find(context, "cuCtxGetCurrent");
    find(set_context, "cuCtxSetCurrent");
    find(context_device, "cuCtxGetDevice");
    find(device, "cuDeviceGet");
    find(primary_context, "cuDevicePrimaryCtxRetain");
  }

  template <class F>
  static void find(F& function, const char* name) {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) fail(error, 0, std::string("looking up ") + name);
    if (address == nullptr) {
      throw std::runtime_error(std::string("the CUDA driver has no ") + name);
    }
    function = reinterpret_cast<F>(address);
  }
};

// The device that is current in a scope. Its primary context stays for the rest of the process.
class Current {
 public:
  Current(int device, int handle, void* context) : driver_(Driver::get()) {
    int current = -1;
    if (driver_.context(&previous_) != 0) previous_ = nullptr;
    if (previous_ != nullptr && driver_.context_device(&current) == 0 && current == handle) return;
    check(static_cast<cudaError_t>(driver_.set_context(context)), device, "cuCtxSetCurrent");
    changed_ = true;
  }
  ~Current() {
    if (changed_) driver_.set_context(previous_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
  void* previous_ = nullptr;
  bool changed_ = false;
};

// What may allocate is not allowed while any thread captures a graph, unless it says that it does
// not mind. Loading of code belongs to no graph.
class AllowedInCapture {
 public:
  AllowedInCapture() { exchange(); }
  ~AllowedInCapture() { exchange(); }
  AllowedInCapture(const AllowedInCapture&) = delete;
  AllowedInCapture& operator=(const AllowedInCapture&) = delete;

 private:
  void exchange() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// --- which code
// -----------------------------------------------------------------------------------

std::string supported() {
  std::string text;
  for (std::size_t i = 0; i < embedded_module_count; ++i) {
    const std::string name = embedded_modules[i].architecture;
    if (i == 0 || name != embedded_modules[i - 1].architecture) {
      text += (text.empty() ? "" : ", ") + name;
    }
  }
  return text;
}

// --- devices and kernels
// --------------------------------------------------------------------------

struct LoadedKernel {
  cudaKernel_t handle = nullptr;
  std::size_t static_shared = 0;
  int max_threads = 0;
  unsigned shared = 0;        // dynamic shared memory that it has been allowed
  bool wide_cluster = false;  // allowed clusters of more than 8 blocks
  const void* function() const { return handle; }
};

struct Device {
  int index = 0;
  int handle = 0;           // the driver's
  void* context = nullptr;  // the primary one
  Limits limits{};
  std::string architecture;  // whose modules it runs; empty: none
  // Keys are the names in embedded_modules: they stay.
  std::unordered_map<std::string_view, LoadedKernel> kernels;
  std::map<std::tuple<const void*, unsigned, unsigned, unsigned>, int> resident;
};

// Never freed: the driver may be gone before the end of the process.
struct Everything {
  std::mutex mutex;
  std::unordered_map<int, Device> devices;
  std::unordered_map<const EmbeddedModule*, cudaLibrary_t> libraries;
};
Everything& everything() {
  static auto* all = new Everything;
  return *all;
}

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), device, "cudaDeviceGetAttribute");
  return value;
}

Limits ask_limits(int device) {
  Limits limits{};
  limits.capability = 10 * attribute(device, cudaDevAttrComputeCapabilityMajor) +
                      attribute(device, cudaDevAttrComputeCapabilityMinor);
  limits.multiprocessors = attribute(device, cudaDevAttrMultiProcessorCount);
  limits.shared_per_block = attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.cooperative = attribute(device, cudaDevAttrCooperativeLaunch) != 0;
  limits.max_cluster = 1;
  if (limits.capability >= 90 && attribute(device, cudaDevAttrClusterLaunch) != 0) {
    // 8 everywhere; 16 on the large chips, which only a loaded kernel could be asked for.
    // Whether such a launch has room, resident_blocks() asks.
    const int major = limits.capability / 10;
    limits.max_cluster = major == 9 || major == 10 ? 16 : 8;
  }
  return limits;
}

// The mutex is held by all that call these.
Device& find_device(int index) {
  auto& devices = everything().devices;
  const auto found = devices.find(index);
  if (found != devices.end()) return found->second;
  Device device;
  device.index = index;
  device.limits = ask_limits(index);
  if (const EmbeddedModule* module =
          choose_module(embedded_modules, embedded_module_count, device.limits.capability)) {
    device.architecture = module->architecture;
  }
  return devices.emplace(index, std::move(device)).first->second;
}

void retain_context(Device& device) {
  if (device.context != nullptr) return;
  const Driver& driver = Driver::get();
  check(static_cast<cudaError_t>(driver.device(&device.handle, device.index)), device.index,
        "cuDeviceGet");
  void* context = nullptr;
  check(static_cast<cudaError_t>(driver.primary_context(&context, device.handle)), device.index,
        "cuDevicePrimaryCtxRetain");
  device.context = context;
}

cudaLibrary_t load(const Device& device, const EmbeddedModule& module) {
  auto& libraries = everything().libraries;
  const auto found = libraries.find(&module);
  if (found != libraries.end()) return found->second;
  const std::string image = inflate(module.image, module.bytes);  // the driver makes a copy
  cudaLibrary_t library = nullptr;
  check(cudaLibraryLoadData(&library, image.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0),
        device.index, std::string("loading kernels for ") + module.architecture);
  libraries.emplace(&module, library);
  return library;
}

LoadedKernel& find_kernel(Device& device, const char* name) {
  const auto found = device.kernels.find(name);
  if (found != device.kernels.end()) return found->second;
  if (device.architecture.empty()) {
    throw std::runtime_error(
        device_name(device.index) +
        " is not among those that the kernels were compiled for: " + supported());
  }
  for (std::size_t i = 0; i < embedded_module_count; ++i) {
    const EmbeddedModule& module = embedded_modules[i];
    if (device.architecture != module.architecture) continue;
    for (std::size_t k = 0; k < module.kernel_count; ++k) {
      if (std::string_view(module.kernels[k].name) != name) continue;
      const AllowedInCapture allowed;
      retain_context(device);
      const Current current(device.index, device.handle, device.context);
      LoadedKernel kernel;
      check(cudaLibraryGetKernel(&kernel.handle, load(device, module), module.kernels[k].symbol),
            device.index, std::string("looking up ") + name);
      // Also brings it into the context now: at a launch, it might be too late for that.
      cudaFuncAttributes attributes;
      check(cudaFuncGetAttributes(&attributes, kernel.function()), device.index,
            std::string("loading ") + name);
      kernel.static_shared = attributes.sharedSizeBytes;
      kernel.max_threads = attributes.maxThreadsPerBlock;
      return device.kernels.emplace(module.kernels[k].name, kernel).first->second;
    }
  }
  throw std::runtime_error(std::string("there is no CUDA kernel ") + name + " for " +
                           device.architecture);
}

// What a kernel must be allowed before it is launched, or its launch is asked about.
void permit(const Device& device, LoadedKernel& kernel, const Launch& launch) {
  const auto set = [&](cudaFuncAttribute which, int value) {
    check(cudaKernelSetAttributeForDevice(kernel.handle, which, value, device.index), device.index,
          std::string("an attribute of ") + launch.kernel + " (" + std::to_string(launch.shared) +
              " bytes of shared memory, clusters of " + std::to_string(launch.cluster) + ")");
  };
  if (launch.shared > kernel.shared) {
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared));
    kernel.shared = launch.shared;
  }
  if (launch.cluster > 8 && !kernel.wide_cluster) {
    set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    kernel.wide_cluster = true;
  }
}

// The runtime's form of a launch.
struct Configuration {
  cudaLaunchConfig_t value{};
  cudaLaunchAttribute attributes[2];

  explicit Configuration(const Launch& launch) {
    value.gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    value.blockDim = dim3(launch.block);
    value.dynamicSmemBytes = launch.shared;
    value.stream = static_cast<cudaStream_t>(launch.stream);
    value.attrs = attributes;
    if (launch.cooperative) {
      cudaLaunchAttribute& attribute = attributes[value.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (launch.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[value.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = launch.cluster;
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

int ask_resident(const Device& device, LoadedKernel& kernel, const Launch& launch) {
  const Limits& limits = device.limits;
  if (kernel.static_shared + launch.shared > static_cast<std::size_t>(limits.shared_per_block) ||
      launch.block > static_cast<unsigned>(kernel.max_threads) ||
      launch.cluster > static_cast<unsigned>(limits.max_cluster)) {
    return 0;
  }
  permit(device, kernel, launch);
  int count = 0;
  if (launch.cluster <= 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
              &count, kernel.function(), static_cast<int>(launch.block), launch.shared),
          device.index, std::string("the occupancy of ") + launch.kernel);
    return count * limits.multiprocessors;
  }
  Configuration configuration(launch);
  configuration.value.gridDim = dim3(launch.cluster);
  const cudaError_t error =
      cudaOccupancyMaxActiveClusters(&count, kernel.function(), &configuration.value);
  // A partition of a chip may have no room for any.
  if (error == cudaErrorInvalidClusterSize) return 0;
  check(error, device.index, std::string("the occupancy of ") + launch.kernel);
  return count * static_cast<int>(launch.cluster);
}

}  // namespace

Limits limits(int device) {
  const std::lock_guard<std::mutex> lock(everything().mutex);
  return find_device(device).limits;
}

int resident_blocks(int device, const Launch& launch) {
  const std::lock_guard<std::mutex> lock(everything().mutex);
  Device& on = find_device(device);
  LoadedKernel& kernel = find_kernel(on, launch.kernel);
  const std::tuple key(kernel.function(), launch.block, launch.cluster, launch.shared);
  const auto found = on.resident.find(key);
  if (found != on.resident.end()) return found->second;
  const AllowedInCapture allowed;
  const Current current(on.index, on.handle, on.context);
  const int count = ask_resident(on, kernel, launch);
  on.resident.emplace(key, count);
  return count;
}

void launch(int device, const Launch& launch, const void* parameter) {
  Everything& all = everything();
  std::unique_lock<std::mutex> lock(all.mutex);
  Device& on = find_device(device);
  LoadedKernel& kernel = find_kernel(on, launch.kernel);
  const Current current(on.index, on.handle, on.context);
  permit(on, kernel, launch);
  const void* function = kernel.function();
  lock.unlock();
  Configuration configuration(launch);
  void* parameters[] = {const_cast<void*>(parameter)};
  check(cudaLaunchKernelExC(&configuration.value, function, parameters), device,
        std::string("launching ") + launch.kernel);
}

}  // namespace fastcell::cuda
