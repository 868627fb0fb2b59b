// gpu.h on threads of this machine; see device_emulated.h.
#include <sched.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "device_emulated.h"
#include "gpu_emulated.h"

namespace fastcell::cuda {
namespace emulated {

thread_local Block* current_block = nullptr;
thread_local int current_thread = 0;

namespace {

constexpr size_t kStackBytes = 64 << 10;

Limits pretended{90, 16, 227 << 10, true, 16};

// The fibers of one block, on one thread of the system.
class Runner {
 public:
  Runner(Block& block, const EmulatedKernel& kernel, const void* parameter)
      : block_(block), kernel_(kernel), parameter_(parameter) {
    stacks_.reset(new char[kStackBytes * size_t(block.threads)]);
    fibers_.resize(size_t(block.threads));
  }

  void run() {
    Runner* outer = running_;
    running_ = this;
    current_block = &block_;
    left_ = block_.threads;
#if defined(__SANITIZE_THREAD__)
    main_fiber_ = __tsan_get_current_fiber();
#endif
    for (int i = 0; i < block_.threads; ++i) {
      Fiber& fiber = fibers_[size_t(i)];
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_.get() + kStackBytes * size_t(i);
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Runner::start, 0);
#if defined(__SANITIZE_THREAD__)
      fiber.sanitizer = __tsan_create_fiber(0);
#endif
    }
    switch_to(&main_, 0);
#if defined(__SANITIZE_THREAD__)
    for (Fiber& fiber : fibers_) __tsan_destroy_fiber(fiber.sanitizer);
#endif
    running_ = outer;
  }

  static void give_way() {
    Runner& self = *running_;
    const int from = current_thread;
    // Other blocks may be what is waited for.
    if (++self.turns_ % unsigned(self.block_.threads) == 0) sched_yield();
    const int next = self.next(from);
    if (next != from) self.switch_to(&self.fibers_[size_t(from)].context, next);
  }

 private:
  struct Fiber {
    ucontext_t context;
    bool done;
    void* sanitizer;
  };

  static void start() {
    running_->kernel_.run(running_->parameter_);
    Runner& self = *running_;
    const int from = current_thread;
    self.fibers_[size_t(from)].done = true;
    if (--self.left_ == 0) {
#if defined(__SANITIZE_THREAD__)
      __tsan_switch_to_fiber(self.main_fiber_, 0);
#endif
      setcontext(&self.main_);
    }
    self.switch_to(&self.fibers_[size_t(from)].context, self.next(from));
  }

  int next(int from) const {
    for (int i = 1; i <= block_.threads; ++i) {
      const int candidate = (from + i) % block_.threads;
      if (!fibers_[size_t(candidate)].done) return candidate;
    }
    return from;
  }

  void switch_to(ucontext_t* from, int to) {
    current_thread = to;
#if defined(__SANITIZE_THREAD__)
    // The first switch orders what the launch wrote before what the kernel reads.
    __tsan_switch_to_fiber(fibers_[size_t(to)].sanitizer,
                           from == &main_ ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(from, &fibers_[size_t(to)].context);
  }

  static thread_local Runner* running_;

  Block& block_;
  const EmulatedKernel& kernel_;
  const void* parameter_;
  std::unique_ptr<char[]> stacks_;
  std::vector<Fiber> fibers_;
  ucontext_t main_;
  void* main_fiber_ = nullptr;
  int left_ = 0;
  unsigned turns_ = 0;
};

thread_local Runner* Runner::running_ = nullptr;

const EmulatedKernel& kernel_named(const char* name) {
  int count = 0;
  const EmulatedKernel* all = emulated_kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (std::string(all[i].name) == name) return all[i];
  }
  throw std::runtime_error(std::string("no emulated kernel is named ") + name);
}

// Consecutive blocks, all at once (those of a cluster, of a cooperative launch) or in any order.
struct Shared {
  explicit Shared(size_t bytes) : memory(new char[bytes + 128]) {}
  char* aligned() const {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 127) & ~uintptr_t(127));
  }
  std::unique_ptr<char[]> memory;
};

}  // namespace

void give_way() { Runner::give_way(); }

void Barrier::wait(int count) {
  const int before = passed.load(std::memory_order_acquire);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
    arrived.store(0, std::memory_order_relaxed);
    passed.fetch_add(1, std::memory_order_acq_rel);
  } else {
    while (passed.load(std::memory_order_acquire) == before) emulated::give_way();
  }
}

void pretend(const Limits& limits) { pretended = limits; }

}  // namespace emulated

Limits limits(int) { return emulated::pretended; }

int resident_blocks(int, const Launch& launch) {
  const Limits& device = emulated::pretended;
  if (int(launch.shared) > device.shared_per_block) return 0;
  return device.multiprocessors / int(launch.cluster) * int(launch.cluster);
}

void launch(int device, const Launch& launch, const void* parameter) {
  using namespace emulated;
  const EmulatedKernel& kernel = kernel_named(launch.kernel);
  const int total = int(launch.grid[0] * launch.grid[1] * launch.grid[2]);
  const int size = int(launch.cluster);
  if (int(launch.shared) > pretended.shared_per_block || launch.grid[0] % launch.cluster != 0 ||
      size > pretended.max_cluster ||
      (launch.cooperative && total > resident_blocks(device, launch))) {
    throw std::runtime_error(std::string("a GPU would refuse this launch of ") + launch.kernel);
  }
  std::vector<Block> blocks(static_cast<size_t>(total));
  std::vector<Block*> pointers;
  std::vector<Cluster> clusters(static_cast<size_t>(total / size));
  std::vector<Shared> shared;
  for (int i = 0; i < total; ++i) {
    Block& block = blocks[size_t(i)];
    block.index[0] = i % int(launch.grid[0]);
    block.index[1] = i / int(launch.grid[0]) % int(launch.grid[1]);
    block.index[2] = i / int(launch.grid[0] * launch.grid[1]);
    block.threads = int(launch.block);
    shared.emplace_back(launch.shared);
    // Not zero, as on a GPU: what is read before it was written shows.
    std::fill_n(shared.back().aligned(), launch.shared, char(0xff));
    block.shared = shared.back().aligned();
    block.cluster = &clusters[size_t(i / size)];
    block.rank = i % size;
    pointers.push_back(&block);
  }
  for (int i = 0; i < total; i += size) {
    clusters[size_t(i / size)].blocks = &pointers[size_t(i)];
    clusters[size_t(i / size)].size = size;
  }
  // Clusters, or blocks of an ordinary launch, by a few threads in turn; of a cooperative one all.
  const int units = total / size;
  const int workers = launch.cooperative ? units : std::min(units, 3);
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) {
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, worker, rank] {
        for (int unit = worker; unit < units; unit += workers) {
          Runner(blocks[size_t(unit * size + rank)], kernel, parameter).run();
        }
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace fastcell::cuda
