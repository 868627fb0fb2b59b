// Trees: what the nodes of a level do between the recurrent products, forward and backward. A
// thread has one unit of one node, its children's forget gates among it. A sum over children is
// made by one thread in the children's order.
#pragma once

#include "row_products.h"
#include "scalar.h"

namespace fastcell::cuda {

// Where a gate's block of H numbers is among a node's: forget gates come second, one in an input
// term, as many as there are positions in a recurrent term, none there with sums over children.
template <class C>
struct TreeColumns {
  const int hidden, forgets;

  explicit FASTCELL_INLINE TreeColumns(const TreeLevel& p)
      : hidden(p.hidden), forgets(p.sums ? 0 : C::forgets * p.positions) {}

  static constexpr int kTerms = C::gates + C::forgets;
  FASTCELL_INLINE int term(int gate) const { return (gate == 0 ? 0 : gate + C::forgets) * hidden; }
  FASTCELL_INLINE int forget_term() const { return hidden; }
  FASTCELL_INLINE int product(int gate) const { return (gate == 0 ? 0 : gate + forgets) * hidden; }
  FASTCELL_INLINE int forget_product(Index position) const { return (1 + int(position)) * hidden; }
};

FASTCELL_INLINE Index own_number() { return Index(block(0)) * kThreads + thread(); }

// What the recurrent products take: rows of the level's inner nodes, then those of its edges.
template <class R>
FASTCELL_KERNEL tree_gather(const FASTCELL_KERNEL_PARAMETER TreeLevel p) {
  const R* const h = static_cast<const R*>(p.h);
  const Index nodes = (p.end - p.begin) * p.seen_width;
  Index at = own_number();
  if (at >= nodes) {
    at -= nodes;
    if (!p.edge_seen || at >= (p.edge_end - p.edge_begin) * p.edge_width) return;
    const Index edge = p.edge_begin + at / p.edge_width;
    const int unit = int(at % p.edge_width);
    static_cast<R*>(p.edge_seen)[at] =
        unit < p.hidden ? h[p.forest.child[edge] * p.hidden + unit] : R(0);
    return;
  }
  const Index inner = p.begin - p.leaves + at / p.seen_width;
  const int column = int(at % p.seen_width), position = column / p.hidden;
  const int unit = column % p.hidden;
  R sum(0);
  if (position < p.positions) {
    const Index end = p.forest.first_edge[inner + 1];
#pragma unroll 4
    for (Index edge = p.forest.first_edge[inner]; edge < end; ++edge) {
      if (p.sums || p.forest.position[edge] == position) {
        sum = sum + h[p.forest.child[edge] * p.hidden + unit];
      }
    }
  }
  static_cast<R*>(p.seen)[at] = sum;
}

template <class R, template <class> class Cell>
FASTCELL_KERNEL tree_forward(const FASTCELL_KERNEL_PARAMETER TreeLevel p) {
  using V = Scalar<R>;
  using C = Cell<V>;
  constexpr int G = C::gates;
  const TreeColumns<C> columns(p);
  const Index at = own_number(), rank = p.begin + at / p.hidden;
  if (rank >= p.end) return;
  const int unit = int(at % p.hidden);
  const Index node = p.forest.order[rank], inner = rank - p.leaves;
  const R* const term = static_cast<const R*>(p.terms) + node * columns.kTerms * p.hidden + unit;
  const R* const product =
      inner < 0 ? nullptr : static_cast<const R*>(p.products) + (rank - p.begin) * p.columns + unit;

  V a[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    a[g] = V(term[columns.term(g)]);
    if (product) a[g] = a[g] + V(product[columns.product(g)]);
  }
  V state = C::begin(a);
  if constexpr (C::forgets > 0) {
    R* const c = static_cast<R*>(p.c);
    if (p.gates) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        static_cast<R*>(p.gates)[(rank * G + g) * p.hidden + unit] = a[g].v;
      }
    }
    if (product) {
      const R forget_term = term[columns.forget_term()];
      R* const forgets = static_cast<R*>(p.forget);
      const Index end = p.forest.first_edge[inner + 1];
#pragma unroll 1
      for (Index edge = p.forest.first_edge[inner]; edge < end; ++edge) {
        const Index i = edge * p.hidden + unit;
        V forget(forget_term +
                 (p.sums ? forgets[i] : product[columns.forget_product(p.forest.position[edge])]));
        state = C::remember(forget, V(c[p.forest.child[edge] * p.hidden + unit]), state);
        if (p.gates) forgets[i] = forget.v;
      }
    }
    c[node * p.hidden + unit] = state.v;
  }
  static_cast<R*>(p.h)[node * p.hidden + unit] = C::finish(a, state).v;
}

template <class R, template <class> class Cell>
FASTCELL_KERNEL tree_backward(const FASTCELL_KERNEL_PARAMETER TreeLevel p) {
  using V = Scalar<R>;
  using C = Cell<V>;
  constexpr int G = C::gates;
  const TreeColumns<C> columns(p);
  const Index at = own_number(), rank = p.begin + at / p.hidden;
  if (rank >= p.end) return;
  const int unit = int(at % p.hidden);
  const Index node = p.forest.order[rank], inner = rank - p.leaves;
  const Index own = node * p.hidden + unit, up = p.forest.edge[rank];
  const auto number = [](const void* from, Index i) { return V(static_cast<const R*>(from)[i]); };

  V d_h = p.d_h ? number(p.d_h, own) : V(0);
  if (up >= 0) {
    const Index position = p.sums ? 0 : p.forest.position[up];
    const Index row = p.forest.owner[up] * p.positions + position;
    d_h = d_h + number(p.d_seen, row * p.hidden + unit);
    if (p.d_edge_seen) d_h = d_h + number(p.d_edge_seen, up * p.hidden + unit);
  }
  V saved[G], d_a[G], state(0), d_c(0);
  if constexpr (C::forgets > 0) {
#pragma unroll
    for (int g = 0; g < G; ++g) saved[g] = number(p.gates, (rank * G + g) * p.hidden + unit);
    state = number(p.c, own);
    if (p.d_c) d_c = number(p.d_c, own);
    if (up >= 0) d_c = d_c + number(p.d_edge_c, up * p.hidden + unit);
  }
  C::backward(saved, number(p.h, own), state, d_h, d_c, d_a);

  R* const d_term = static_cast<R*>(p.d_terms) + node * columns.kTerms * p.hidden + unit;
  R* const d_product =
      inner < 0 ? nullptr : static_cast<R*>(p.d_products) + inner * p.d_width + unit;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    d_term[columns.term(g)] = d_a[g].v;
    if (d_product) d_product[columns.product(g)] = d_a[g].v;
  }
  if constexpr (C::forgets > 0) {
    V total(0);
    if (d_product) {
      const Index end = p.forest.first_edge[inner + 1];
#pragma unroll 1
      for (Index edge = p.forest.first_edge[inner]; edge < end; ++edge) {
        const Index i = edge * p.hidden + unit;
        V d_forget;
        const V d_child = C::remember_backward(number(p.forget, i),
                                               number(p.c, p.forest.child[edge] * p.hidden + unit),
                                               d_c, d_forget);
        static_cast<R*>(p.d_edge_c)[i] = d_child.v;
        if (p.sums) {
          static_cast<R*>(p.d_forget)[edge * p.edge_width + unit] = d_forget.v;
        } else {
          d_product[columns.forget_product(p.forest.position[edge])] = d_forget.v;
        }
        total = total + d_forget;
      }
    }
    d_term[columns.forget_term()] = total.v;
  }
}

}  // namespace fastcell::cuda
