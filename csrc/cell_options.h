// What Python says of a cell besides its kind, as the engines take it.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/options.h"

namespace fastcell {

// (activation, output activation, clip, zoneout of h, of c); no clip: infinity.
using CellOptionsTuple = std::tuple<std::string, std::string, double, double, double>;

inline Activation activation_named(const std::string& name) {
  constexpr const char* kNames[kActivations] = {"tanh",     "relu",     "sigmoid",
                                                "identity", "softsign", "elu"};
  std::string all;
  for (int i = 0; i < kActivations; ++i) {
    if (name == kNames[i]) return Activation(i);
    all += std::string(i ? ", " : "") + kNames[i];
  }
  throw std::invalid_argument("activation must be one of " + all + ", got " + name);
}

inline CellOptions cell_options(const CellOptionsTuple& from) {
  const auto& [activation, output_activation, clip, zoneout_h, zoneout_c] = from;
  return {activation_named(activation),
          activation_named(output_activation),
          std::isfinite(clip),
          clip,
          {zoneout_h, zoneout_c}};
}

}  // namespace fastcell
