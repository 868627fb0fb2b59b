// One block of threads at work on a sequence: which samples and units are its, where the operands
// of its products lie, how it hands on what it made.
//
// A block has `rows` samples of the batch (a tile) and `units` hidden units, all gates of each. Its
// warps share the products: 16 samples, 8 units and a part of k each. The parts of k meet in shared
// memory, where they are added in order; then a thread finishes up to kPairs pairs of a sample and
// a unit. What the cell made is published: the next product of every block of the tile needs it.
#pragma once

#include "products.h"
#include "shared_layout.h"

namespace fastcell::cuda {

// Where a kernel lives, which is how long, where the weights are and how h is exchanged.
struct Step {  // one step per launch: weights and h in global memory
  static constexpr bool resident = false;
  static constexpr bool cluster = false;
};
struct Grid {  // all steps: weights in shared memory, h through global memory, one flag per block
  static constexpr bool resident = true;
  static constexpr bool cluster = false;
};
struct Cluster {  // all steps: weights and h in shared memory, h written into every block's
  static constexpr bool resident = true;
  static constexpr bool cluster = true;
};

template <class P, class Place, int Groups>
struct Block {
  using E = typename P::Element;
  using R = typename P::Real;
  static constexpr int kHeld = held_chunks(Place::resident, P::kTensor, Groups);

  const Sweep& p;
  const int direction, tile, rank;
  const Side& side;
  const int rows, units;
  const Index first_sample, first_unit;
  const SharedLayout layout;
  int published;
  bool arrived = false;  // at the cluster's barrier, and has not waited there yet
  Bytes16 held[kHeld > 0 ? kHeld : 1][Groups];

  explicit FASTCELL_INLINE Block(const Sweep& sweep)
      : p(sweep),
        direction(block(2)),
        tile(sweep.first_tile + block(1)),
        rank(block(0)),
        side(sweep.side[direction]),
        rows(sweep.row_warps * kWarpRows),
        units(sweep.unit_warps * kGroup),
        first_sample(Index(tile) * rows),
        first_unit(Index(rank) * units),
        layout(sweep.row_warps, sweep.unit_warps, sweep.k_warps, sweep.width, sweep.projected_width,
               Place::resident, Place::cluster, Groups, kHeld, sizeof(E), sizeof(R)),
        // (By the launches before this one: flags count on.)
        published(int(sweep.begin) * (sweep.projected_width ? 2 : 1)) {}

  // Brings in what stays for all steps.
  FASTCELL_INLINE void begin() {
    if (thread() == 0) *stopped() = 0;
    if constexpr (Place::resident) {
      bring_weights();
      fill(shared_memory() + layout.weights, packed_at(side.projection, p.projected_width, 1),
           layout.projection);
    }
    if constexpr (Place::cluster) {
      const Index bytes = Index(rows) * stride(p.width) * Index(sizeof(E));
      for (int slot = 0; slot < 2; ++slot) {
        fill(shared_memory() + layout.hidden + slot * bytes, exchanged(slot), bytes);
      }
      fill(shared_memory() + layout.projected, side.exchange_projected,
           Index(rows) * stride(p.projected_width) * Index(sizeof(E)));
      arrive();  // no block may write here before that
    } else {
      block_barrier();
    }
  }
  // Leaves what was published last, in `slot`, where the next launch's begin() looks for it.
  FASTCELL_INLINE void hand_over(int slot, int each) const {
    if constexpr (Place::cluster) {
      const char* from = reinterpret_cast<const char*>(hidden(slot));
      char* to = reinterpret_cast<char*>(exchanged(slot));
      own_pieces(p.width, each, [&](Index at) { store16(to + at, load16(from + at)); });
    }
  }
  // A block of a cluster must not end while another writes to its memory.
  FASTCELL_INLINE void end() {
    if (arrived) await();
  }

  // --- pairs
  // --------------------------------------------------------------------------------------

  // Pair i of this thread, if the block has it: sample and unit within the block's.
  FASTCELL_INLINE bool pair(int i, int& row, int& unit) const {
    const int index = thread() + i * kThreads;
    row = index / units;
    unit = index % units;
    return index < rows * units;
  }

  // The sums of a product for such a pair, group by group.
  template <int N>
  FASTCELL_INLINE void gather(int row, int unit, R (&sum)[N]) const {
    const R* sums = reinterpret_cast<const R*>(shared_memory() + layout.sums);
    const Index one = Index(rows) * units;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const R* at = sums + n * one + row * units + unit;
      sum[n] = at[0];
      // (To the most there can be, so that all loads are on their way at once.)
#pragma unroll
      for (int k = 1; k < kWarps; ++k) {
        if (k < p.k_warps) sum[n] = sum[n] + at[k * N * one];
      }
    }
  }

  // --- products
  // -----------------------------------------------------------------------------------

  // With what was exchanged in `slot`, by the recurrent weights: the sums of Groups columns per
  // unit. Begins and ends with what the threads of the block must wait for.
  FASTCELL_INLINE void multiply(int slot) const {
    if constexpr (Place::cluster) {
      multiply(PlainLoad{}, hidden(slot));
    } else {
      multiply(FreshLoad{}, exchanged(slot));
    }
  }
  // With what was exchanged for the projection, by its weights.
  FASTCELL_INLINE void multiply_projected() const {
    if constexpr (Place::cluster) {
      multiply_projected(PlainLoad{}, projected());
    } else {
      multiply_projected(FreshLoad{}, exchanged_projected());
    }
  }

  // --- exchange
  // -----------------------------------------------------------------------------------

  // Where the operand k of a sample (of the block's) lies for the product after this one.
  FASTCELL_INLINE E* to_publish(int slot, int row) const {
    if constexpr (Place::cluster) return hidden(slot) + Index(row) * stride(p.width);
    return exchanged(slot) + Index(row) * stride(p.width);
  }
  FASTCELL_INLINE E* to_publish_projected(int row) const {
    if constexpr (Place::cluster) return projected() + Index(row) * stride(p.projected_width);
    return exchanged_projected() + Index(row) * stride(p.projected_width);
  }

  // Says that this block's part, `each` numbers per unit, is written. Between this and await() is
  // time for what needs nothing of the other blocks.
  FASTCELL_INLINE void publish(int slot, int each) { send(hidden(slot), p.width, each); }
  FASTCELL_INLINE void publish_projected() { send(projected(), p.projected_width, 1); }

  // Waits for all blocks of the tile to have published as often as this one, or to have begun.
  // False if that took too long: something is wrong, and nothing after it can be right.
  FASTCELL_INLINE bool await() {
    if constexpr (Place::cluster) {
      cluster_wait();
      arrived = false;
      return true;
    } else if constexpr (Place::resident) {
      const int* flags = side.flags + Index(tile) * p.unit_blocks;
#pragma unroll 1
      for (int i = thread(); i < p.unit_blocks; i += kThreads) {
#pragma unroll 1
        for (Index looks = 1; load_acquire(flags + i) < published; ++looks) {
          if (looks >= p.patience || (looks % 1024 == 0 && load_system(p.status) != 0)) {
            store_system(p.status, 1);
            *stopped() = 1;
            break;
          }
        }
      }
      block_barrier();
      return *stopped() == 0;
    } else {
      return true;
    }
  }

 private:
  static FASTCELL_INLINE Index stride(int width) {
    return row_stride(width, sizeof(E), Place::cluster);
  }
  FASTCELL_INLINE void arrive() {
    cluster_arrive();
    arrived = true;
  }

  struct PlainLoad {
    FASTCELL_INLINE Bytes16 operator()(const char* at) const { return load16(at); }
  };
  struct FreshLoad {
    FASTCELL_INLINE Bytes16 operator()(const char* at) const { return load16_fresh(at); }
  };

  FASTCELL_INLINE int* stopped() const {
    return reinterpret_cast<int*>(shared_memory() + layout.stopped);
  }
  FASTCELL_INLINE E* hidden(int slot) const {
    return reinterpret_cast<E*>(shared_memory() + layout.hidden) +
           Index(slot) * rows * stride(p.width);
  }
  FASTCELL_INLINE E* projected() const {
    return reinterpret_cast<E*>(shared_memory() + layout.projected);
  }
  FASTCELL_INLINE E* exchanged(int slot) const {
    return static_cast<E*>(side.exchange) + (Index(slot) * p.tiles + tile) * rows * stride(p.width);
  }
  FASTCELL_INLINE E* exchanged_projected() const {
    return static_cast<E*>(side.exchange_projected) +
           Index(tile) * rows * stride(p.projected_width);
  }
  // The block's part of packed weights: for each 8 of its units all chunks of k, N groups each.
  FASTCELL_INLINE const char* packed_at(const void* weights, int width, int N) const {
    return static_cast<const char*>(weights) +
           Index(rank) * p.unit_warps * (Index(N) * kGroup * width * Index(sizeof(E)));
  }

  // This warp's part of a product.
  struct Part {
    int row_warp, unit_warp, k_part;
    int chunks, first, last;  // of k: all, and from where to where
  };
  FASTCELL_INLINE Part part(int width) const {
    const int warp = thread() / 32;
    const int rest = warp / p.k_warps;
    Part own{rest / p.unit_warps, rest % p.unit_warps, warp % p.k_warps, 0, 0, 0};
    own.chunks = width * int(sizeof(E)) / kChunkBytes;
    const int each = SharedLayout::each_chunks(width, sizeof(E), p.k_warps);
    own.first = own.k_part * each;
    own.last = own.first + each < own.chunks ? own.first + each : own.chunks;
    return own;
  }

  // The first chunks of each warp's part of k into its registers, the others into shared memory:
  // [unit warp][part of k][chunk].
  FASTCELL_INLINE void bring_weights() {
    const char* all = packed_at(side.weights, p.width, Groups);
    const Part own = part(p.width);
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        // (Where there are fewer, any will do: they are not used.)
        const int chunk = own.first + i < own.last ? own.first + i : 0;
        P::template take<Groups>(held[i], all + chunk_at(own, chunk));
      }
    }
    const Index left = SharedLayout::each_chunks(p.width, sizeof(E), p.k_warps) - kHeld;
    if (left <= 0) return;
    const Index bytes = left * Groups * kChunkWeights;
#pragma unroll 1
    for (int i = 0; i < p.unit_warps * p.k_warps; ++i) {
      Part other = own;
      other.unit_warp = i / p.k_warps;
      const int first = i % p.k_warps * int(left + kHeld) + kHeld;
      const int last = first + int(left) < own.chunks ? first + int(left) : own.chunks;
      fill(shared_memory() + i * bytes, all + chunk_at(other, first),
           Index(last - first) * Groups * kChunkWeights);
    }
  }
  FASTCELL_INLINE Index chunk_at(const Part& own, int chunk) const {
    return (Index(own.unit_warp) * own.chunks + chunk) * (Groups * kChunkWeights);
  }

  static FASTCELL_INLINE void fill(char* to, const void* from, Index bytes) {
    const char* source = static_cast<const char*>(from);
#pragma unroll 1
    for (Index at = Index(thread()) * 16; at < bytes; at += kThreads * 16) {
      store16(to + at, load16(source + at));
    }
  }

  // By the recurrent weights.
  template <class Load>
  FASTCELL_INLINE void multiply(const Load& load, const E* operand) const {
    const Part own = part(p.width);
    const char* rows_at = row_at(own, operand, p.width);
    const Index row_bytes = stride(p.width) * Index(sizeof(E));
    R sums[Groups][4] = {};
    const char* weights;  // of chunk 0
    if constexpr (Place::resident) {
      const Index left = SharedLayout::each_chunks(p.width, sizeof(E), p.k_warps) - kHeld;
      weights = shared_memory() +
                ((Index(own.unit_warp) * p.k_warps + own.k_part) * left - own.first - kHeld) *
                    (Groups * kChunkWeights);
    } else {
      weights = packed_at(side.weights, p.width, Groups) + chunk_at(own, 0);
    }
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (own.first + i < own.last) {
          P::template held_chunk<Groups>(sums, rows_at + Index(own.first + i) * kChunkBytes,
                                         row_bytes, held[i], load);
        }
      }
    }
    add_chunks<Groups>(sums, load, rows_at, row_bytes, weights, own.first + kHeld, own.last);
    leave<Groups>(sums, own);
  }
  // By the projection's, of one group of columns.
  template <class Load>
  FASTCELL_INLINE void multiply_projected(const Load& load, const E* operand) const {
    const Part own = part(p.projected_width);
    const Index row_bytes = stride(p.projected_width) * Index(sizeof(E));
    R sums[1][4] = {};
    const char* all = Place::resident ? shared_memory() + layout.weights
                                      : packed_at(side.projection, p.projected_width, 1);
    add_chunks<1>(sums, load, row_at(own, operand, p.projected_width), row_bytes,
                  all + Index(own.unit_warp) * own.chunks * kChunkWeights, own.first, own.last);
    leave<1>(sums, own);
  }

  FASTCELL_INLINE const char* row_at(const Part& own, const E* operand, int width) const {
    return reinterpret_cast<const char*>(operand + Index(own.row_warp * kWarpRows + (lane() >> 2)) *
                                                       stride(width));
  }

  template <int N, class Load>
  static FASTCELL_INLINE void add_chunks(R (&sums)[N][4], const Load& load, const char* rows_at,
                                         Index row_bytes, const char* weights, int first,
                                         int last) {
#pragma unroll P::kUnroll
    for (int chunk = first; chunk < last; ++chunk) {
      P::template chunk<N>(sums, rows_at + Index(chunk) * kChunkBytes, row_bytes,
                           weights + Index(chunk) * (N * kChunkWeights), load);
    }
  }

  // Into shared memory, where the parts of k meet.
  template <int N>
  FASTCELL_INLINE void leave(const R (&sums)[N][4], const Part& own) const {
    const int row = lane() >> 2, column = 2 * (lane() & 3);
    R* to = reinterpret_cast<R*>(shared_memory() + layout.sums) +
            (Index(own.k_part) * N * rows + own.row_warp * kWarpRows + row) * units +
            own.unit_warp * kGroup + column;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      R* at = to + Index(n) * rows * units;
      at[0] = sums[n][0];
      at[1] = sums[n][1];
      at[8 * units] = sums[n][2];
      at[8 * units + 1] = sums[n][3];
    }
    block_barrier();
  }

  // Where this block's part of what is exchanged lies, 16 bytes for 16 bytes, `each` numbers per
  // unit: f(bytes from the begin of the first row).
  template <class F>
  FASTCELL_INLINE void own_pieces(int width, int each, const F& f) const {
    const Index row_bytes = Index(width) * Index(sizeof(E));
    const Index begin = first_unit * each * Index(sizeof(E));
    const int pieces = int(Index(units) * each * Index(sizeof(E)) / 16);
#pragma unroll 1
    for (int i = thread(); i < rows * pieces; i += kThreads) {
      const Index at = begin + Index(i % pieces) * 16;
      // (Not units that do not exist.)
      if (at < row_bytes) f(Index(i / pieces) * stride(width) * Index(sizeof(E)) + at);
    }
  }

  FASTCELL_INLINE void send(E* operand, int width, int each) {
    block_barrier();
    if constexpr (Place::cluster) {
      own_pieces(width, each, [&](Index at) {
        char* from = reinterpret_cast<char*>(operand) + at;
        const Bytes16 piece = load16(from);
#pragma unroll 1
        for (int other = 0; other < p.unit_blocks; ++other) {
          if (other != rank) store16_remote(from, other, piece);
        }
      });
      arrive();
    } else if constexpr (Place::resident) {
      // The barrier above orders the block's writes before this flag.
      ++published;
      if (thread() == 0) {
        store_release(side.flags + Index(tile) * p.unit_blocks + rank, published);
      }
    }
  }
};

}  // namespace fastcell::cuda
