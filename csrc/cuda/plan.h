// How a layer's sequence is run on a device: which kernel, and how blocks and warps share the work.
#pragma once

#include <string>

#include "gpu.h"

namespace fastcell::cuda {

// What the host must know of a cell (its traits, ../cells/README.md) and of a kind of products.
struct CellFacts {
  const char* name;  // in Python
  const char* type;  // in C++
  int gates, apart, states, saved, parameters;
  bool recurrent;
  int second;
  bool persistent;  // whether there are kernels for all steps at once
};
struct ProductsFacts {
  const char* name;
  const char* type;
  int element, real;  // bytes of a number as stored, as summed
  bool persistent;    // whether there are kernels for all steps at once
  bool tensor;        // whether tensor cores multiply
  double chunk_time;  // ns that a warp takes for 64 bytes along k, 8 columns
  int capability;     // least that has them
};
const CellFacts& cell_facts(const std::string& name);
const ProductsFacts& products_facts(const std::string& name);

struct Sizes {
  bool backward;
  long long steps, batch;
  int hidden, output;  // H; P or H
  int directions;
  bool projected;  // or with a second product, which goes the same way
};

enum class Place { kStep, kGrid, kCluster };
constexpr const char* kPlaceNames[] = {"step", "grid", "cluster"};

struct Plan {
  CellFacts cell;
  ProductsFacts products;
  Sizes sizes;
  int device;
  Place place;
  int row_warps, unit_warps, k_warps;
  int unit_blocks, tiles;
  int tiles_at_once;  // of one launch
  int width, projected_width;
  int stride, projected_stride;  // of rows of what is exchanged
  int shared;                    // bytes per block
  int at_once;  // launches of such a layer that the device holds at once; 0: not one as a whole
  double time;  // ns that the model expects

  std::string kernel() const;
};

// The plan that the model of the machine finds fastest; with `wanted` (a place's name, or empty)
// the fastest of those. Throws std::invalid_argument if there is none.
Plan choose_plan(int device, const CellFacts& cell, const std::string& products, const Sizes& sizes,
                 const std::string& wanted);

}  // namespace fastcell::cuda
