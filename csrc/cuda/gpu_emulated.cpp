// gpu.h on threads of this machine; see device_emulated.h.
#include <sched.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define FASTCELL_THREAD_SANITIZER
#elif defined(__has_feature)  // clang
#if __has_feature(thread_sanitizer)
#define FASTCELL_THREAD_SANITIZER
#endif
#endif
#if defined(FASTCELL_THREAD_SANITIZER)
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

struct Fiber {
  ucontext_t context;
  void* sanitizer;
  bool done;
};

// Fibers for the threads of one block. They serve one block after another: making them takes the
// sanitizer half a millisecond each.
struct Team {
  explicit Team(int threads)
      : stacks(new char[kStackBytes * size_t(threads)]), memory(new Fiber[size_t(threads)]) {
#if defined(FASTCELL_THREAD_SANITIZER)
    for (int i = 0; i < threads; ++i) memory[size_t(i)].sanitizer = __tsan_create_fiber(0);
#endif
  }
  std::unique_ptr<char[]> stacks;
  std::unique_ptr<Fiber[]> memory;
};

class Teams {
 public:
  std::unique_ptr<Team> take(int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::unique_ptr<Team>>& idle = idle_[threads];
    if (idle.empty()) return std::make_unique<Team>(threads);
    std::unique_ptr<Team> one = std::move(idle.back());
    idle.pop_back();
    return one;
  }
  void give(int threads, std::unique_ptr<Team> one) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_[threads].push_back(std::move(one));
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<std::unique_ptr<Team>>> idle_;
};
Teams& teams = *new Teams;  // (for good)

// One block, on one thread of the system. Lives until the launch has ended.
class Runner {
 public:
  Runner(Block& block, size_t shared, const EmulatedKernel& kernel, const void* parameter)
      : block_(block), shared_(shared), kernel_(kernel), parameter_(parameter) {}
  Runner(const Runner&) = delete;

  FASTCELL_UNOBSERVED void run() {
    running_ = this;
    current_block = &block_;
    team_ = teams.take(block_.threads);
    fibers_ = team_->memory.get();
    for (int i = 0; i < block_.threads; ++i) {
      prepare(fibers_[i], team_->stacks.get() + kStackBytes * size_t(i));
    }
#if defined(FASTCELL_THREAD_SANITIZER)
    main_fiber_ = __tsan_get_current_fiber();
    begin();
    switch_to(&main_, 0);
#else
    switch_to(&main_, 0);
    teams.give(block_.threads, std::move(team_));
#endif
  }

  // Orders all that the block's threads did before what the caller does. (Not before that has a
  // team another block: two blocks of a launch would be the same threads.)
  void end() {
    if (!gone_.load(std::memory_order_acquire)) std::terminate();
    if (team_) teams.give(block_.threads, std::move(team_));
  }

  FASTCELL_UNOBSERVED static void give_way() {
    Runner& self = *running_;
    const int from = current_thread;
    // Other blocks may be what is waited for.
    if (++self.turns_ % unsigned(self.block_.threads) == 0) sched_yield();
    const int next = self.next(from);
    if (next != from) self.switch_to(&self.fibers_[from].context, next);
  }

 private:
  FASTCELL_UNOBSERVED static void prepare(Fiber& fiber, void* stack) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Runner::start, 0);
  }

  FASTCELL_UNOBSERVED static void start() {
    Runner& self = *running_;
    self.follow();
    self.kernel_.run(self.parameter_);
    const int from = current_thread;
    self.fibers_[from].done = true;
    if (self.last()) self.switch_back();
    self.switch_to(&self.fibers_[from].context, self.next(from));
  }

  // What was before the launch is ordered before what a fiber does.
  void begin() { begun_.store(true, std::memory_order_release); }
  void follow() const { begun_.load(std::memory_order_acquire); }

  // Whether the calling fiber is the block's last. Its shared memory ends with it, whoever still
  // wants to write there.
  bool last() {
    const int threads = block_.threads;  // (nothing of the emulation's after what orders it)
    if (ended_.fetch_add(1, std::memory_order_acq_rel) + 1 != threads) return false;
    std::fill_n(block_.shared, shared_, char(0xff));
    gone_.store(true, std::memory_order_release);
    return true;
  }

  FASTCELL_UNOBSERVED int next(int from) const {
    for (int i = 1; i <= block_.threads; ++i) {
      const int candidate = (from + i) % block_.threads;
      if (!fibers_[candidate].done) return candidate;
    }
    return from;
  }

  // No switch orders anything.
  FASTCELL_UNOBSERVED void switch_to(ucontext_t* from, int to) {
    current_thread = to;
#if defined(FASTCELL_THREAD_SANITIZER)
    __tsan_switch_to_fiber(fibers_[to].sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(from, &fibers_[to].context);
  }
  FASTCELL_UNOBSERVED void switch_back() {
#if defined(FASTCELL_THREAD_SANITIZER)
    __tsan_switch_to_fiber(main_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
    setcontext(&main_);
  }

  static thread_local Runner* running_;

  Block& block_;
  size_t shared_;
  const EmulatedKernel& kernel_;
  const void* parameter_;
  std::unique_ptr<Team> team_;
  Fiber* fibers_ = nullptr;
  ucontext_t main_;
  void* main_fiber_ = nullptr;
  std::atomic<bool> begun_{false};
  std::atomic<int> ended_{0};  // threads
  std::atomic<bool> gone_{false};
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

// A block's shared memory.
struct Shared {
  explicit Shared(size_t bytes) : memory(new char[bytes + 128]) {}
  char* aligned() const {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 127) &
                                   ~uintptr_t(127));
  }
  std::unique_ptr<char[]> memory;
};

}  // namespace

void give_way() { Runner::give_way(); }

namespace {
// `passed` is released by the last alone and acquired before the next wait: no thread can learn of
// what another did after the barrier.
template <bool orders>
int arrive_at(Barrier& barrier, int count) {
  constexpr auto release = orders ? std::memory_order_release : std::memory_order_relaxed;
  constexpr auto acquire = orders ? std::memory_order_acquire : std::memory_order_relaxed;
  const int before = barrier.passed.load(std::memory_order_relaxed);
  if (barrier.arrived.fetch_add(1, release) + 1 == count) {
    barrier.arrived.load(acquire);
    barrier.arrived.store(0, std::memory_order_relaxed);
    barrier.passed.fetch_add(1, release);
  }
  return before;
}
template <bool orders>
void wait_at(Barrier& barrier, int before) {
  constexpr auto acquire = orders ? std::memory_order_acquire : std::memory_order_relaxed;
  while (barrier.passed.load(std::memory_order_relaxed) == before) emulated::give_way();
  barrier.passed.load(acquire);
}
}  // namespace

void Barrier::wait(int count) { await(arrive(count)); }
void Barrier::meet(int count) { wait_at<false>(*this, arrive_at<false>(*this, count)); }
int Barrier::arrive(int count) { return arrive_at<true>(*this, count); }
void Barrier::await(int before) { wait_at<true>(*this, before); }

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
      launch.grid[1] > 65535 || launch.grid[2] > 65535 || size > pretended.max_cluster ||
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
    block.before.resize(launch.block);
    pointers.push_back(&block);
  }
  for (int i = 0; i < total; i += size) {
    clusters[size_t(i / size)].blocks = &pointers[size_t(i)];
    clusters[size_t(i / size)].size = size;
  }
  // Clusters, or blocks of an ordinary launch, by a few threads in turn; of a cooperative one all.
  std::deque<Runner> runners;
  for (Block& block : blocks) runners.emplace_back(block, launch.shared, kernel, parameter);
  const int units = total / size;
  const int workers = launch.cooperative ? units : std::min(units, 3);
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) {
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, worker, rank] {
        for (int unit = worker; unit < units; unit += workers) {
          runners[size_t(unit * size + rank)].run();
        }
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (Runner& runner : runners) runner.end();
}

}  // namespace fastcell::cuda
