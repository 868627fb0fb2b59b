// What most cells have in common; README.md explains each. A cell derives from these and says what
// is otherwise.
#pragma once

#include "../common/options.h"
#include "../common/portable.h"

namespace fastcell::cells {

struct CellTraits {
  static constexpr int apart = 0;
  static constexpr int states = 1;
  static constexpr int saved = 0;
  static constexpr bool direct = false;
  static constexpr int parameters = 0;
  static constexpr int held = 0;
  static constexpr int second = 0;
  static constexpr bool recurrent = true;
};

}  // namespace fastcell::cells
