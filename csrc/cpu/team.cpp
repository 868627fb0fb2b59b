#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace fastcell {
namespace {

// libgomp's pool does not survive fork: its threads are gone in the child, and the first parallel
// region there would wait for them for ever. A child runs on the calling thread alone.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// Long enough for a partner that runs (a step takes microseconds), short enough for one that does
// not: the pause instruction alone takes up to 140 cycles.
constexpr int kSpins = 2000;

int64_t now() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// In nanoseconds. A call that lost more than kLong to absent partners keeps the next ones from
// barriers for a while: longer each time that trying again finds the machine as crowded as before.
constexpr int64_t kLong = 1000000;
constexpr int64_t kShortestHold = 20000000, kLongestHold = 1000000000;
std::atomic<int64_t> lost{0};  // by all threads, after their spins
std::atomic<int64_t> hold{kShortestHold};
std::atomic<int64_t> crowded_until{0};

void note_loss(int64_t nanoseconds) {
  const int64_t length = hold.load(std::memory_order_relaxed);
  if (nanoseconds > kLong) {
    crowded_until.store(now() + length, std::memory_order_relaxed);
    hold.store(std::min(2 * length, kLongestHold), std::memory_order_relaxed);
  } else if (length > kShortestHold) {
    hold.store(std::max(length / 2, kShortestHold), std::memory_order_relaxed);
  }
}

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Done>
void spin(Done done, bool counted) {
  for (int spins = 0; spins < kSpins; ++spins) {
    if (done()) return;
    pause_cpu();
  }
  const int64_t began = now();
  while (!done()) sched_yield();
  if (counted) lost.fetch_add(now() - began, std::memory_order_relaxed);
}

}  // namespace

void wait(Barrier& barrier, int size) {
  const int phase = __atomic_load_n(&barrier.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier.phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  spin([&] { return __atomic_load_n(&barrier.phase, __ATOMIC_ACQUIRE) != phase; }, true);
}

// Waiting for the others' first part is no sign of a crowded machine.
void wait_until(Barrier& counter, int value) {
  spin([&] { return __atomic_load_n(&counter.phase, __ATOMIC_ACQUIRE) >= value; }, false);
}

void advance_to(Barrier& counter, int value) {
  __atomic_store_n(&counter.phase, value, __ATOMIC_RELEASE);
}

bool crowded() {
  const int64_t until = crowded_until.load(std::memory_order_relaxed);
  return until != 0 && now() < until;
}

void run_team(int threads, Work work, const void* context) {
  (void)registered;
  if (threads <= 1 || forked.load(std::memory_order_relaxed)) {
    Barrier unused[2];  // the team's, and that of its one part
    work(Team{0, 1, &unused[0]}, unused, context);
    return;
  }
  Barrier barriers[kMaxBarriers];
  const int64_t lost_before = lost.load(std::memory_order_relaxed);
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer threads than asked (nesting, limits): the team is what is here.
    const Team team{omp_get_thread_num(), omp_get_num_threads(), &barriers[0]};
    work(team, barriers, context);
  }
  note_loss(lost.load(std::memory_order_relaxed) - lost_before);
}

}  // namespace fastcell
