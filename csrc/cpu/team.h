// A team of threads that run one call together, and the barrier between its steps.
#pragma once

#include <cstdint>

#include "../common/portable.h"

namespace fastcell {

// Sense-reversing spin barrier. About 0.1 us between two cores against libgomp's 0.25 us; after a
// bounded spin it yields, so that an oversubscribed machine is slow, not stuck.
struct alignas(64) Barrier {
  int arrived = 0;
  alignas(64) int phase = 0;
};

void wait(Barrier& barrier, int size);

// A counter of work done, in a Barrier's memory: who needs it waits until it has come so far.
void wait_until(Barrier& counter, int value);
void advance_to(Barrier& counter, int value);

// One thread's place in a team. Barriers of the sub-teams are the engine's to hand out.
struct Team {
  int index = 0;
  int size = 1;
  Barrier* barrier = nullptr;

  FASTCELL_INLINE void sync() const {
    if (size > 1) wait(*barrier, size);
  }
};

// The part of [0, total) that belongs to `index` of `parts`: sizes differ by one at most.
struct Range {
  int64_t begin, end;
};
FASTCELL_INLINE Range part(int64_t total, int index, int parts) {
  return {total * index / parts, total * (index + 1) / parts};
}

constexpr int kMaxBarriers = 64;  // sub-teams of one call

// Whether threads have lately waited long for a partner that the system had taken off its core.
// While the machine is shared like that, a barrier at every step can take a time slice
// (milliseconds) each time: better to share out work without.
bool crowded();

// Calls work(team, barriers, context) on `threads` OpenMP threads. `barriers` are fresh and shared.
using Work = void (*)(const Team& team, Barrier* barriers, const void* context);
void run_team(int threads, Work work, const void* context);

}  // namespace fastcell
