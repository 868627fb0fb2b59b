#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>

namespace fastcell {
namespace {

// libgomp's pool does not survive fork: its threads are gone in the child, and the first parallel
// region there would wait for them for ever. A child runs on the calling thread alone.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// Long enough for a partner that runs (a step takes microseconds), short enough for one that does
// not: the pause instruction alone takes up to 140 cycles.
constexpr int kSpins = 2000;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void wait(Barrier& barrier, int size) {
  const int phase = __atomic_load_n(&barrier.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier.phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&barrier.phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
    if (spins < kSpins) {
      pause_cpu();
    } else {
      sched_yield();
    }
  }
}

void run_team(int threads, Work work, const void* context) {
  (void)registered;
  Barrier barriers[kMaxBarriers];
  if (threads <= 1 || forked.load(std::memory_order_relaxed)) {
    work(Team{0, 1, &barriers[0]}, barriers, context);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer threads than asked (nesting, limits): the team is what is here.
    const Team team{omp_get_thread_num(), omp_get_num_threads(), &barriers[0]};
    work(team, barriers, context);
  }
}

}  // namespace fastcell
