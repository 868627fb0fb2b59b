// The engine for trees: level by level, leaves first, and back from the roots.
//
// The input terms of all nodes are one product before the levels. A level is then the recurrent
// products of its nodes, whose operands are children's rows wherever they lie, and the cell's
// pointwise maths, by panels of hidden units: a thread that has a panel's sums for some nodes has
// all that these units need. One barrier per level, and one more where sums over children come
// first.
//
// An element is the sum of chains that tile.h makes, whichever nodes share its tile, and children
// are added in their order: a tree has the same bits alone and in any batch, and a chain those of
// forward.h.
#pragma once

#include "../common/tree.h"
#include "math.h"
#include "products.h"

namespace fastcell::FASTCELL_ISA {

// The sizes that both directions share. Columns of gates, in the kernels' order: those of a node,
// then the forget gate's. `terms`: operands of a recurrent product.
template <class T, class Cell>
struct TreeSizes {
  static constexpr int G = Cell::gates;
  static constexpr int F = Cell::forgets;

  const Forest& forest;
  const int64_t I, H;
  const bool sums;    // over children, instead of a term for each
  const int terms;    // 1 of the sum, or one per position
  const int forgets;  // forget gates that have recurrent weights of their own
  const int64_t padded;

  explicit TreeSizes(const TreeCall& call)
      : forest(call.forest),
        I(call.input),
        H(call.hidden),
        sums(call.arity == 0),
        terms(call.positions()),
        forgets(F * call.positions()),
        padded(over_units(0).padded_units()) {}

  Panels<T> over_units(int64_t depth) const { return {1, H, depth}; }
  int hidden_gates() const { return G + forgets; }

  // Block of torch's rows: i, f, g, o, with f as often as there are matrices.
  static int input_row(int gate) { return F == 0 || gate == 0 ? gate : gate < G ? gate + 1 : 1; }
  int hidden_row(int gate) const { return F == 0 || gate == 0 ? gate : gate + forgets; }
  static int forget_row(int position) { return 1 + position; }

  // The sum of the children's h, for nodes with more than one.
  void sum_children(int64_t node, const T* h, T* sum) const {
    constexpr int lanes = Vec<T>::lanes;
    const int64_t *child = forest.children + forest.child_offsets[node],
                  *end = forest.children + forest.child_offsets[node + 1];
    for (int64_t j = 0; j < H; j += lanes) {
      const int valid = H - j < lanes ? int(H - j) : lanes;
      Vec<T> total = load_first(h + child[0] * H + j, valid);
      for (const int64_t* k = child + 1; k < end; ++k) {
        total = total + load_first(h + *k * H + j, valid);
      }
      store_first(sum + node * H + j, total, valid);
    }
  }

  // What the recurrent weights of a node's gates are multiplied by: null without children there.
  const T* operand(int64_t node, int term, const T* h, const T* sum) const {
    if (!sums) {
      const int64_t child = forest.child_at(node, term);
      return child < 0 ? nullptr : h + child * H;
    }
    const int64_t count = forest.child_count(node);
    if (count == 0) return nullptr;
    return count > 1 ? sum + node * H : h + forest.children[forest.child_offsets[node]] * H;
  }
};

// Rows gathered from anywhere for one product.
template <class T>
struct Gathered {
  const T* a[kRowBlock];
  T* c[kRowBlock];
  int64_t node[kRowBlock];
  int n = 0;

  void add(const T* from, T* to, int64_t which = 0) {
    a[n] = from;
    c[n] = to;
    node[n++] = which;
  }
  // What c holds (or init) plus a times a panel's rows [first, first + depth).
  void multiply(const T* panel, int vectors, int64_t first, int64_t depth,
                const T* init = nullptr) {
    if (n == 0) return;
    constexpr int lanes = Vec<T>::lanes;
    multiply_panel<Plain<T>>(a, c, n, panel + first * vectors * lanes, vectors, depth, lanes, init);
  }
};

template <class T, template <class> class CellOf>
class TreeForward {
 public:
  static int64_t workspace_bytes(const TreeCall& call, int) {
    Arena arena(nullptr);
    Buffers(call, arena);
    return arena.used();
  }

  static void run(const TreeCall& call, const TreeGradients*, const Team& team) {
    TreeForward(call, team).run();
  }

 private:
  using V = Vec<T>;
  using Cell = CellOf<V>;
  using Sizes = TreeSizes<T, Cell>;
  static constexpr int G = Cell::gates;
  static constexpr int F = Cell::forgets;
  static constexpr int lanes = V::lanes;

  struct Buffers {
    T* x_weights;  // [gate]: panels
    T* h_weights;  // [gate], then [forget gate]: panels over all terms
    T* bias;       // [gate][padded]
    T* sums;       // (nodes, H), of nodes with several children
    T* gates;      // (nodes, G + F, padded)

    Buffers(const TreeCall& call, Arena& arena) {
      const Sizes s(call);
      x_weights = arena.take<T>((G + F) * s.over_units(s.I).size());
      h_weights = arena.take<T>(s.hidden_gates() * s.over_units(s.terms * s.H).size());
      bias = arena.take<T>((G + F) * s.padded);
      sums = arena.take<T>(s.sums ? s.forest.nodes * s.H : 0);
      T* const own = arena.take<T>(call.gates ? 0 : s.forest.nodes * (G + F) * s.padded);
      gates = call.gates ? static_cast<T*>(call.gates) : own;
    }
  };

  const TreeCall& call;
  const Team& team;
  const Sizes s;
  const Forest& forest;
  Arena arena;
  const Buffers buffers;
  const Panels<T> over_x, over_h;
  T* const h;
  T* const c;

  TreeForward(const TreeCall& call, const Team& team)
      : call(call),
        team(team),
        s(call),
        forest(call.forest),
        arena(call.workspace),
        buffers(call, arena),
        over_x(s.over_units(s.I)),
        over_h(s.over_units(s.terms * s.H)),
        h(static_cast<T*>(call.h)),
        c(static_cast<T*>(call.c)) {}

  const T* weight(TreeWeight which) const { return static_cast<const T*>(call.weights[which]); }

  // The argument of a gate, later the gate. A child's forget gate lies in the child's row: until
  // then that place holds the input term of its own children's forget gates.
  T* gate(int64_t node, int which) const {
    return buffers.gates + (node * (G + F) + which) * s.padded;
  }

  void run() {
    pack();
    team.sync();
    project();
    team.sync();
    for (int64_t level = 0; level < forest.levels; ++level) {
      const int64_t* const nodes = forest.order + forest.level_offsets[level];
      const int64_t count = forest.level_offsets[level + 1] - forest.level_offsets[level];
      if (sum_children(nodes, count)) team.sync();
      const Share share(over_h.count(), 0, count, over_h.rows_each(), team.index, team.size);
      share.for_each(level % 2 != 0, [&](int64_t p, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kRowBlock) {
          const int n = int(end - i < kRowBlock ? end - i : kRowBlock);
          if (level > 0) multiply(p, nodes + i, n);
          finish(p, nodes + i, n);
        }
      });
      team.sync();
    }
  }

  void pack() const {
    const auto pack = [&](const Panels<T>& panels, const T* matrix, int row, T* to) {
      pack_transposed(panels, matrix + row * s.H * panels.depth, to,
                      part(panels.count(), team.index, team.size), 0);
    };
    const T *w_ih = weight(kInputWeight), *w_hh = weight(kHiddenWeight);
    for (int g = 0; g < G + F; ++g) {
      pack(over_x, w_ih, Sizes::input_row(g), buffers.x_weights + g * over_x.size());
    }
    for (int g = 0; g < G; ++g) {
      pack(over_h, w_hh, s.hidden_row(g), buffers.h_weights + g * over_h.size());
    }
    for (int q = 0; q < s.forgets; ++q) {
      pack(over_h, w_hh, Sizes::forget_row(q), buffers.h_weights + (G + q) * over_h.size());
    }
    if (team.index > 0) return;
    const T *b_ih = weight(kInputBias), *b_hh = weight(kHiddenBias);
    for (int g = 0; g < G + F; ++g) {
      const int64_t row = Sizes::input_row(g) * s.H;
      for (int64_t j = 0; j < s.padded; ++j) {
        buffers.bias[g * s.padded + j] = b_ih && j < s.H ? b_ih[row + j] + b_hh[row + j] : T(0);
      }
    }
  }

  // The input terms of all nodes.
  void project() const {
    const T* const x = static_cast<const T*>(call.x);
    const int64_t count = over_x.count();
    const Share share((G + F) * count, 0, forest.nodes, over_x.rows_each(), team.index, team.size);
    share.for_each(false, [&](int64_t panel, int64_t begin, int64_t end) {
      const int g = int(panel / count);
      const int64_t p = panel % count, unit = over_x.first_unit(p);
      for (int64_t i = begin; i < end; i += kRowBlock) {
        Gathered<T> rows;
        for (int64_t r = i; r < end && r < i + kRowBlock; ++r) {
          rows.add(x + r * s.I, gate(r, g) + unit);
        }
        rows.multiply(buffers.x_weights + g * over_x.size() + over_x.offset(p), over_x.vectors(p),
                      0, s.I, buffers.bias + g * s.padded + unit);
      }
    });
  }

  // Whether there was anything to sum.
  bool sum_children(const int64_t* nodes, int64_t count) const {
    if (!s.sums) return false;
    bool any = false;
    const Range mine = part(count, team.index, team.size);
    for (int64_t i = 0; i < count; ++i) {
      if (forest.child_count(nodes[i]) < 2) continue;
      any = true;
      if (mine.begin <= i && i < mine.end) s.sum_children(nodes[i], h, buffers.sums);
    }
    return any;
  }

  // Adds the recurrent terms of one panel to the arguments.
  void multiply(int64_t p, const int64_t* nodes, int n) const {
    const int vectors = over_h.vectors(p);
    const int64_t unit = over_h.first_unit(p);
    const T* const panel = buffers.h_weights + over_h.offset(p);
    for (int term = 0; term < s.terms; ++term) {
      Gathered<T> rows;
      for (int i = 0; i < n; ++i) {
        const T* const from = s.operand(nodes[i], term, h, buffers.sums);
        if (from) rows.add(from, nullptr, nodes[i]);
      }
      for (int g = 0; g < G; ++g) {
        for (int i = 0; i < rows.n; ++i) rows.c[i] = gate(rows.node[i], g) + unit;
        rows.multiply(panel + g * over_h.size(), vectors, term * s.H, s.H);
      }
    }
    if constexpr (F > 0) {
      if (s.sums) {
        forget_each(panel + G * over_h.size(), vectors, unit, nodes, n);
      } else {
        for (int q = 0; q < s.terms; ++q) {
          forget_at(q, panel + (G + q) * over_h.size(), vectors, unit, nodes, n);
        }
      }
    }
  }

  // Child-sum: a forget gate sees its own child.
  void forget_each(const T* panel, int vectors, int64_t unit, const int64_t* nodes, int n) const {
    Gathered<T> rows;
    for (int i = 0; i < n; ++i) {
      const int64_t end = forest.child_offsets[nodes[i] + 1];
      for (int64_t e = forest.child_offsets[nodes[i]]; e < end; ++e) {
        const int64_t child = forest.children[e];
        rows.add(h + child * s.H, begin_forget(child, nodes[i], unit, vectors));
        if (rows.n < kRowBlock) continue;
        rows.multiply(panel, vectors, 0, s.H);
        rows.n = 0;
      }
    }
    rows.multiply(panel, vectors, 0, s.H);
  }

  // N-ary: the forget gate of a position sees all of the siblings.
  void forget_at(int position, const T* panel, int vectors, int64_t unit, const int64_t* nodes,
                 int n) const {
    Gathered<T> owners;
    for (int i = 0; i < n; ++i) {
      const int64_t child = forest.child_at(nodes[i], position);
      if (child >= 0) owners.add(nullptr, begin_forget(child, nodes[i], unit, vectors), nodes[i]);
    }
    for (int term = 0; term < s.terms; ++term) {
      Gathered<T> rows;
      for (int i = 0; i < owners.n; ++i) {
        const T* const from = s.operand(owners.node[i], term, h, nullptr);
        if (from) rows.add(from, owners.c[i]);
      }
      rows.multiply(panel, vectors, term * s.H, s.H);
    }
  }

  // The input term of the node's forget gates, at the child's place.
  T* begin_forget(int64_t child, int64_t node, int64_t unit, int vectors) const {
    T* const to = gate(child, G) + unit;
    std::memcpy(to, gate(node, G) + unit, size_t(vectors * lanes) * sizeof(T));
    return to;
  }

  // The cell's maths for one panel and some nodes.
  void finish(int64_t p, const int64_t* nodes, int n) const {
    for (int i = 0; i < n; ++i) {
      const int64_t node = nodes[i];
      for (int v = 0; v < over_h.vectors(p); ++v) {
        const int64_t unit = over_h.first_unit(p) + v * lanes;
        const int valid = s.H - unit < lanes ? int(s.H - unit) : lanes;
        V a[G];
        for (int g = 0; g < G; ++g) a[g] = V::load(gate(node, g) + unit);
        V state = Cell::begin(a);
        if constexpr (F > 0) {
          for (int g = 0; g < G; ++g) a[g].store(gate(node, g) + unit);
          const int64_t end = forest.child_offsets[node + 1];
          for (int64_t e = forest.child_offsets[node]; e < end; ++e) {
            const int64_t child = forest.children[e];
            T* const at = gate(child, G) + unit;
            V forget = V::load(at);
            state = Cell::remember(forget, load_first(c + child * s.H + unit, valid), state);
            forget.store(at);
          }
          store_first(c + node * s.H + unit, state, valid);
        }
        store_first(h + node * s.H + unit, Cell::finish(a, state), valid);
      }
    }
  }
};

// Backpropagation through structure: a node takes the gradient that its parent's gates send it, and
// leaves its own gates' for its children. What the weights get is products over all nodes after it.
template <class T, template <class> class CellOf>
class TreeBackward {
 public:
  static int64_t workspace_bytes(const TreeCall& call, int threads) {
    Arena arena(nullptr);
    Buffers(call, threads, arena);
    return arena.used();
  }

  static void run(const TreeCall& call, const TreeGradients* gradients, const Team& team) {
    TreeBackward(call, *gradients, team).run();
  }

 private:
  using V = Vec<T>;
  using Cell = CellOf<V>;
  using Sizes = TreeSizes<T, Cell>;
  static constexpr int G = Cell::gates;
  static constexpr int F = Cell::forgets;
  static constexpr int lanes = V::lanes;

  // A node's row of gradients: [forget gates][its gates][sum of its children's forget gates]. The
  // first are, child-sum: of the node's own forget gate, at its parent; N-ary: of the gates of its
  // children by position. So the recurrent product reads the first two, the input's the last two.
  // Rows lie in the order of the levels: those of the nodes that have children, together.
  struct Buffers {
    int64_t* ranks;  // (nodes): of a node in that order
    T* d_gates;      // (nodes, width)
    T* d_c;          // (nodes, padded): what comes from the parent
    T* d_sums;       // (nodes, padded): of the sum of the children's h
    T* sums;         // (nodes, H): that sum, of nodes with several children
    T* h_weights;    // child-sum: a node's gates; N-ary: [position], all gates
    T* f_weights;    // child-sum: the forget gate
    T* x_weights;
    T* zeros;  // a row
    typename WeightGradient<T>::Buffers product;

    Buffers(const TreeCall& call, int threads, Arena& arena)
        : product(widest(call), call.hidden, call.forest.nodes, threads, arena) {
      const Sizes s(call);
      const int64_t nodes = s.forest.nodes;
      ranks = arena.take<int64_t>(nodes);
      d_gates = arena.take<T>(nodes * width(s));
      d_c = arena.take<T>(F * nodes * s.padded);
      d_sums = arena.take<T>(s.sums ? nodes * s.padded : 0);
      sums = arena.take<T>(s.sums ? nodes * s.H : 0);
      h_weights = arena.take<T>(s.terms * recurrent(s).size());
      f_weights = arena.take<T>(s.sums ? F * s.over_units(s.H).size() : 0);
      x_weights = arena.take<T>(over_x(s).size());
      zeros = arena.take<T>(s.H + lanes);
    }
  };

  static int64_t widest(const TreeCall& call) {
    return call.input > call.hidden ? call.input : call.hidden;
  }
  static int64_t width(const Sizes& s) { return (s.forgets + G + F) * s.H; }
  // Child-sum: the sum of the children's h alone, since forget gates see each child for itself.
  static Panels<T> recurrent(const Sizes& s) {
    return s.over_units((G + (s.sums ? 0 : s.forgets)) * s.H);
  }
  static Panels<T> over_x(const Sizes& s) { return {1, s.I, (G + F) * s.H}; }

  const TreeCall& call;
  const TreeGradients& out;
  const Team& team;
  const Sizes s;
  const Forest& forest;
  Arena arena;
  const Buffers buffers;
  const Panels<T> over_h, over_f;
  const T* const h;
  const T* const c;

  TreeBackward(const TreeCall& call, const TreeGradients& out, const Team& team)
      : call(call),
        out(out),
        team(team),
        s(call),
        forest(call.forest),
        arena(call.workspace),
        buffers(call, team.size, arena),
        over_h(recurrent(s)),
        over_f(s.over_units(s.H)),
        h(static_cast<const T*>(call.h)),
        c(static_cast<const T*>(call.c)) {}

  const T* weight(TreeWeight which) const { return static_cast<const T*>(call.weights[which]); }
  const T* gate(int64_t node, int which) const {
    return static_cast<const T*>(call.gates) + (node * (G + F) + which) * s.padded;
  }
  T* d_row(int64_t node) const { return buffers.d_gates + buffers.ranks[node] * width(s); }
  T* d_forget(int64_t node, int64_t child) const {
    return s.sums ? d_row(child) : d_row(node) + forest.positions[child] * s.H;
  }
  T* d_own(int64_t node, int which) const { return d_row(node) + (s.forgets + which) * s.H; }

  void run() {
    pack();
    prepare_nodes();
    team.sync();
    for (int64_t level = forest.levels - 1; level >= 0; --level) {
      const int64_t* const nodes = forest.order + forest.level_offsets[level];
      const int64_t count = forest.level_offsets[level + 1] - forest.level_offsets[level];
      for_blocks(over_h, level, count, [&](int64_t p, int64_t i, int n) {
        alignas(64) T d_h[kRowBlock * kMaxVectors * lanes];
        begin(p, nodes + i, n, d_h);
        finish(p, nodes + i, n, d_h);
      });
      team.sync();
      if (!s.sums || level == 0) continue;
      for_blocks(over_h, level, count,
                 [&](int64_t p, int64_t i, int n) { pass_to_sum(p, nodes + i, n); });
      team.sync();
    }
    gradients_of_weights();
    if (out.d_x) gradient_of_input();
  }

  template <class Do>
  void for_blocks(const Panels<T>& panels, int64_t level, int64_t count, Do f) const {
    const Share share(panels.count(), 0, count, panels.rows_each(), team.index, team.size);
    share.for_each(level % 2 != 0, [&](int64_t p, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kRowBlock) {
        f(p, i, int(end - i < kRowBlock ? end - i : kRowBlock));
      }
    });
  }

  void pack() const {
    const T *w_hh = weight(kHiddenWeight), *w_ih = weight(kInputWeight);
    const int64_t H = s.H, columns = s.terms * H;
    const Range mine = part(over_h.count(), team.index, team.size);
    const int forgets = s.sums ? 0 : s.forgets;
    for (int term = 0; term < s.terms; ++term) {
      pack_rows(
          over_h,
          [&](int64_t k) {
            const int block = int(k / H);
            const int row =
                block < forgets ? Sizes::forget_row(block) : s.hidden_row(block - forgets);
            return w_hh + (row * H + k % H) * columns + term * H;
          },
          buffers.h_weights + term * over_h.size(), mine);
    }
    if (F > 0 && s.sums) {
      pack_rows(
          over_f, [&](int64_t k) { return w_hh + (Sizes::forget_row(0) * H + k) * columns; },
          buffers.f_weights, mine);
    }
    if (out.d_x) {
      const Panels<T> panels = over_x(s);
      pack_rows(
          panels,
          [&](int64_t k) { return w_ih + (Sizes::input_row(int(k / H)) * H + k % H) * s.I; },
          buffers.x_weights, part(panels.count(), team.index, team.size));
    }
    if (team.index == 0) std::memset(buffers.zeros, 0, size_t(H + lanes) * sizeof(T));
  }

  void prepare_nodes() const {
    const Range mine = part(forest.nodes, team.index, team.size);
    for (int64_t rank = mine.begin; rank < mine.end; ++rank) {
      const int64_t node = forest.order[rank];
      buffers.ranks[node] = rank;
      if (s.sums && forest.child_count(node) > 1) s.sum_children(node, h, buffers.sums);
    }
  }

  // The gradients of some nodes' h, in one panel's units: from outside, and from the parent's
  // gates.
  void begin(int64_t p, const int64_t* nodes, int n, T* d_h) const {
    const int vectors = over_h.vectors(p);
    const int64_t unit = over_h.first_unit(p);
    const T* const given = static_cast<const T*>(out.d_h);
    for (int i = 0; i < n; ++i) {
      const int64_t parent = forest.parents[nodes[i]];
      for (int v = 0; v < vectors; ++v) {
        const int64_t left = s.H - unit - v * lanes;
        V sum = given ? load_first(given + nodes[i] * s.H + unit + v * lanes,
                                   left < lanes ? int(left) : lanes)
                      : V(0);
        if (s.sums && parent >= 0) {
          sum = sum + V::load(buffers.d_sums + parent * s.padded + unit + v * lanes);
        }
        sum.store(d_h + (i * vectors + v) * lanes);
      }
    }
    if (s.sums) {
      if (F == 0) return;
      Gathered<T> rows;
      for (int i = 0; i < n; ++i) {
        if (forest.parents[nodes[i]] >= 0) rows.add(d_row(nodes[i]), d_h + i * vectors * lanes);
      }
      rows.multiply(buffers.f_weights + over_f.offset(p), vectors, 0, s.H);
      return;
    }
    for (int term = 0; term < s.terms; ++term) {
      Gathered<T> rows;
      for (int i = 0; i < n; ++i) {
        const int64_t parent = forest.parents[nodes[i]];
        if (parent < 0 || forest.positions[nodes[i]] != term) continue;
        rows.add(d_row(parent), d_h + i * vectors * lanes);
      }
      rows.multiply(buffers.h_weights + term * over_h.size() + over_h.offset(p), vectors, 0,
                    over_h.depth);
    }
  }

  // The cell's backward maths for some nodes and one panel of units.
  void finish(int64_t p, const int64_t* nodes, int n, const T* d_h) const {
    const int vectors = over_h.vectors(p);
    for (int i = 0; i < n; ++i) {
      const int64_t node = nodes[i];
      for (int v = 0; v < vectors; ++v) {
        const int64_t unit = over_h.first_unit(p) + v * lanes;
        finish_unit(node, unit, s.H - unit < lanes ? int(s.H - unit) : lanes,
                    V::load(d_h + (i * vectors + v) * lanes));
      }
    }
  }

  FASTCELL_INLINE void finish_unit(int64_t node, int64_t unit, int valid, V d_h) const {
    const bool root = forest.parents[node] < 0;
    V saved[G], d_a[G], state(0), d_c(0);
    if constexpr (F > 0) {
      for (int g = 0; g < G; ++g) saved[g] = V::load(gate(node, g) + unit);
      state = load_first(c + node * s.H + unit, valid);
      const T* const given = static_cast<const T*>(out.d_c);
      if (given) d_c = load_first(given + node * s.H + unit, valid);
      if (!root) d_c = d_c + V::load(buffers.d_c + node * s.padded + unit);
    }
    Cell::backward(saved, load_first(h + node * s.H + unit, valid), state, d_h, d_c, d_a);
    for (int g = 0; g < G; ++g) store_first(d_own(node, g) + unit, d_a[g], valid);
    if constexpr (F > 0) {
      // No gate: at a root of sums over children, and at positions without a child.
      const int forgets = !s.sums ? s.forgets : root ? 1 : 0;
      for (int q = 0; q < forgets; ++q) store_first(d_row(node) + q * s.H + unit, V(0), valid);
      V total(0);
      const int64_t end = forest.child_offsets[node + 1];
      for (int64_t e = forest.child_offsets[node]; e < end; ++e) {
        const int64_t child = forest.children[e];
        V d_forget_gate;
        Cell::remember_backward(V::load(gate(child, G) + unit),
                                load_first(c + child * s.H + unit, valid), d_c, d_forget_gate)
            .store(buffers.d_c + child * s.padded + unit);
        store_first(d_forget(node, child) + unit, d_forget_gate, valid);
        total = total + d_forget_gate;
      }
      store_first(d_own(node, G) + unit, total, valid);
    }
  }

  // The gradient of the sum of the children's h, once for all of them.
  void pass_to_sum(int64_t p, const int64_t* nodes, int n) const {
    alignas(64) T zeros[kMaxVectors * lanes] = {};
    Gathered<T> rows;
    for (int i = 0; i < n; ++i) {
      if (forest.child_count(nodes[i]) == 0) continue;
      rows.add(d_own(nodes[i], 0), buffers.d_sums + nodes[i] * s.padded + over_h.first_unit(p));
    }
    rows.multiply(buffers.h_weights + over_h.offset(p), over_h.vectors(p), 0, over_h.depth, zeros);
  }

  void gradient_of_input() const {
    // (Nothing is added to, so that the scratch memory is not used.)
    T* const d_x = static_cast<T*>(out.d_x);
    multiply_rows<T>(
        over_x(s), buffers.x_weights, Range{0, forest.nodes},
        [&](int64_t r) -> const T* { return d_own(forest.order[r], 0); },
        [&](int64_t r) { return d_x + forest.order[r] * s.I; }, false, buffers.zeros, team);
  }

  void gradients_of_weights() const {
    using Gradient = WeightGradient<T>;
    const int64_t H = s.H, nodes = forest.nodes, rows_of_h = s.hidden_gates() * H;
    const Timeline time{1, nodes, nodes, nullptr};
    const Range all{0, nodes}, inner{forest.level_offsets[1], nodes};
    T* const d_ih = static_cast<T*>(out.d_w_ih);
    T* const d_hh = static_cast<T*>(out.d_w_hh);
    const int64_t own = s.forgets * H;
    int half = 0;
    // Weights that see rows of `features` numbers, or two kinds of such at once.
    const auto run = [&](Range rows, int64_t features, auto first, auto second, const auto& parts) {
      const auto in_order = [&](auto row_of) {
        return [row_of, this](int64_t, int64_t, int64_t r) -> const T* {
          return row_of(forest.order[r]);
        };
      };
      const auto a = in_order(first), b = in_order(second);
      const typename Gradient::template Features<std::decay_t<decltype(a)>> of_a{a, features};
      const typename Gradient::template Features<std::decay_t<decltype(b)>> of_b{b, features};
      Gradient::run(buffers.d_gates + rows.begin * width(s), width(s), time, rows, of_a, of_b,
                    parts, true, half, buffers.product, team);
    };
    if (d_ih) {
      const T* const x = static_cast<const T*>(call.x);
      const auto x_row = [&](int64_t node) { return x + node * s.I; };
      const auto x_part = [&](int gate, int count) {
        return typename Gradient::Part{own + gate * H, count * H,
                                       d_ih + Sizes::input_row(gate) * H * s.I, nullptr};
      };
      if constexpr (F == 0) {
        const typename Gradient::Part parts[] = {x_part(0, G)};
        run(all, s.I, x_row, x_row, parts);
      } else {
        // The gates that lie together in torch's rows as well.
        const typename Gradient::Part parts[] = {x_part(0, 1), x_part(1, G - 1), x_part(G, 1)};
        run(all, s.I, x_row, x_row, parts);
      }
    }
    if (d_hh && inner.begin == inner.end) {
      const Range mine = part(s.terms * rows_of_h * H, team.index, team.size);
      std::memset(d_hh + mine.begin, 0, size_t(mine.end - mine.begin) * sizeof(T));
    }
    for (int term = 0; d_hh && inner.begin < inner.end && term < s.terms; term += 2) {
      const auto h_row = [&](int which) {
        return [which, this](int64_t node) {
          const T* const from = s.operand(node, which, h, buffers.sums);
          return from ? from : static_cast<const T*>(buffers.zeros);
        };
      };
      const auto h_part = [&](int64_t column, int64_t count, int row) {
        T* const to = d_hh + (term * rows_of_h + row * H) * H;
        return typename Gradient::Part{column, count, to,
                                       term + 1 < s.terms ? to + rows_of_h * H : nullptr};
      };
      if constexpr (F == 0) {
        const typename Gradient::Part parts[] = {h_part(0, G * H, 0)};
        run(inner, H, h_row(term), h_row(term + 1), parts);
      } else {
        const auto of_forget = h_part(0, own, Sizes::forget_row(0));
        const typename Gradient::Part parts[] = {
            h_part(own, H, s.hidden_row(0)), h_part(own + H, (G - 1) * H, s.hidden_row(1)),
            s.sums ? typename Gradient::Part{0, own, nullptr, nullptr} : of_forget};
        run(inner, H, h_row(term), h_row(term + 1), parts);
        // Child-sum: those of the forget gates stand in the rows of the children.
        const typename Gradient::Part forget[] = {of_forget};
        const auto child = [&](int64_t node) { return h + node * H; };
        if (s.sums) run(all, H, child, child, forget);
      }
    }
    if (!out.d_bias) return;
    for (int g = 0; g < G + F; ++g) {
      const Range mine = part(H, team.index, team.size);
      sum_columns(buffers.d_gates, width(s), nodes, own + g * H + mine.begin,
                  own + g * H + mine.end, false,
                  static_cast<T*>(out.d_bias) + Sizes::input_row(g) * H + mine.begin);
    }
  }
};

}  // namespace fastcell::FASTCELL_ISA
