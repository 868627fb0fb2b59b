// Which way of sharing a call among threads costs least, by a model of the machine.
#include <unistd.h>

#include "engine.h"

namespace fastcell {
namespace {

// Nanoseconds and bytes per nanosecond of a current server core. Only their ratios decide, and only
// between ways that all give the same result.
constexpr double kFmaPerLane = 6.0;          // two units at 3 GHz
constexpr double kNearestBandwidth = 300.0;  // weights in the core's nearest cache
constexpr double kNearBandwidth = 150.0;     // weights in the core's own cache
constexpr double kFarBandwidth = 30.0;       // weights in the shared cache
constexpr double kNotHidden = 0.3;           // of the shorter of work and reading, behind the other
constexpr double kExchange = 10.0;           // of h, from another core's cache
constexpr double kStep = 150.0;              // of loops and pointers, per step
constexpr double kBarrier = 250.0;           // per step; plus a little for every thread
constexpr double kBarrierPerThread = 30.0;
constexpr double kWake = 4000.0;  // a team's start and end, per call
constexpr int kTileRows = 6;
constexpr double kNearestCache = 32768;

double own_cache_bytes() {
  static const double bytes = [] {
    long size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size > 0 ? double(size) : double(1 << 20);
  }();
  return bytes;
}

double ceiling(double a, double b) { return double(int64_t((a + b - 1) / b)); }

struct Model {
  const Stack& s;
  const Timeline& time;
  const CellKernels& cell;

  // Time of the whole call, in nanoseconds.
  double cost(const Schedule& schedule) const {
    const bool narrow = s.products == Products::kBFloat16, integer = s.products == Products::kInt8;
    const double item = integer ? 1 : narrow ? 2 : s.dtype == DType::kFloat32 ? 4 : 8;
    const double samples = time.steps > 0 ? double(time.rows) / double(time.steps) : 0;
    const double rows = ceiling(samples, schedule.batch_groups);
    const double columns = double(cell.gates) * double(s.hidden);
    const double group = integer && int8_dots ? 4 : narrow && bfloat16_dots ? 2 : 1;
    const double rate = kFmaPerLane * cell.lanes * group;

    // Work is handed out as panels times row tiles: the largest share sets the pace.
    const double panels = ceiling(double(s.hidden) * (cell.gates == 1 ? 0.25 : 1.0), cell.lanes);
    const double units = panels * ceiling(rows, kTileRows);
    const double share = ceiling(units, schedule.unit_threads) / (units > 0 ? units : 1);

    // The group of layers that takes longest sets the pace of a wavefront, which the last group
    // joins once the others have done their first part.
    double most = 0;
    for (int group = 0; group < schedule.layer_groups; ++group) {
      const Range layers = part(s.layers, group, schedule.layer_groups);
      double sum = 0;
      for (int64_t layer = layers.begin; layer < layers.end; ++layer) {
        sum += layer_time(schedule, s.layer_input(int(layer)), rows, share, rate, item) *
               (s.directions / schedule.direction_groups);
      }
      if (sum > most) most = sum;
    }
    if (schedule.layer_groups > 1) {
      const double each = double(wavefront_steps(time.steps, schedule.layer_groups));
      const double parts = ceiling(double(time.steps), each);
      most *= (parts + schedule.layer_groups - 1) / parts;
      most += parts * (kBarrier + kBarrierPerThread * schedule.layer_groups);
    }
    return most + (schedule.threads() > 1 ? kWake : 0);
  }

  // Of one layer and direction; rows: of a step, in one part of the batch; share: of its columns
  // that the busiest thread has.
  double layer_time(const Schedule& schedule, int64_t input, double rows, double share, double rate,
                    double item) const {
    const double columns = double(cell.gates) * double(s.hidden) * share;
    const double steps = double(time.steps);
    // Few rows: the input's products are one before the steps, and read their weights seldom.
    const bool apart = double(time.rows) < double(kOwnProjection) * steps * schedule.batch_groups;
    const double depth = double(s.output) + (apart ? 0 : double(input));
    const double weights = columns * depth * item;
    // What comes past between two readings of a weight: in a wavefront all that its group's layers
    // have, since they take turns.
    double between = weights;
    if (schedule.layer_groups > 1) {
      const double layers = ceiling(s.layers, schedule.layer_groups);
      between = columns * layers * double(s.output + s.layer_input(1)) * item;
    }
    const double bandwidth = between <= kNearestCache             ? kNearestBandwidth
                             : between <= 0.7 * own_cache_bytes() ? kNearBandwidth
                                                                  : kFarBandwidth;
    const double work = rows * columns * depth / rate, reading = weights / bandwidth;
    double step = work > reading ? work + kNotHidden * reading : reading + kNotHidden * work;
    step += kStep;
    if (const int threads = schedule.unit_threads; threads > 1) {
      step += kBarrier + kBarrierPerThread * threads;
      const double others = double(threads - 1) / threads;
      const double bytes = s.dtype == DType::kFloat32 ? 4 : 8;
      step += rows * double(s.output) * others * bytes / kExchange;
    }
    return steps * step + (apart ? steps * rows * columns * double(input) / rate : 0);
  }
};

}  // namespace

Schedule choose_schedule(const Stack& s, const Timeline& time, const CellKernels& cell, int threads,
                         bool barriers, bool wavefront) {
  const Model model{s, time, cell};
  Schedule best{1, 1, 1};
  double least = model.cost(best);
  const auto consider = [&](const Schedule& candidate) {
    const double cost = model.cost(candidate);
    if (cost >= least) return;
    least = cost;
    best = candidate;
  };
  for (int directions = 1; directions <= s.directions; ++directions) {
    const int each = threads / directions;
    for (int groups = 1; groups <= each && groups * directions < kMaxBarriers; ++groups) {
      // Samples of a ragged batch end at different steps: parts of the batch are not equal at every
      // one, so that a part of the units is better.
      if (groups > 1 && ((time.offsets && barriers) || groups > time.batch)) break;
      const int most = barriers ? each / groups : 1;
      for (int units = 1; units <= most;
           units = units < most && units * 2 > most ? most : units * 2) {
        consider({directions, groups, units});
      }
    }
  }
  const int deepest = wavefront && barriers && s.directions == 1 ? s.layers : 1;
  for (int groups = 2; groups <= threads && groups <= deepest && 2 * groups < kMaxBarriers - 1;
       ++groups) {
    for (int units = 1; units * groups <= threads; units *= 2) {
      consider({1, 1, units, groups});
    }
  }
  return best;
}

}  // namespace fastcell
