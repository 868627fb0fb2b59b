// What a cell is told besides its traits: the same for all units, steps and layers of a stack.
#pragma once

namespace fastcell {

// A nonlinearity as its users name it (python/fastcell/cells.py has the same order).
enum class Activation { kTanh, kRelu, kSigmoid, kIdentity, kSoftsign, kElu };
constexpr int kActivations = 6;

struct CellOptions {
  Activation activation;         // of the candidate: g, n or v
  Activation output_activation;  // of the memory cell, before the output gate
  bool clips;                    // whether the gates' arguments are bounded
  double clip;                   // by this, on both sides
  double zoneout[2];             // probabilities with which a unit keeps its h, its c
};

}  // namespace fastcell
