#pragma once

// f32: IEEE single precision, stored as it is.

#include "qat/grid/device.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

struct F32 {
  static constexpr Info kInfo{"f32", 32, 1, 0, 0, {}, true, DType::kF32};

  static QAT_HD float round(float w) { return w; }
};

}  // namespace qat::grid
