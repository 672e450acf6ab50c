#include "qat/checkpoint/outline.hpp"

#include <ATen/ops/empty.h>

#include "check.hpp"

namespace qat {

QuantizedTensor outline_tensor(const std::string& key, const std::vector<int64_t>& shape,
                               const Scheme& scheme) {
  constexpr std::size_t kStack = 3;
  const int64_t first = shape.empty() ? 0 : shape[0];
  const int64_t rows = shape.size() == kStack ? first * shape[1] : first;
  const checkpoint::Sizes sizes = checkpoint::sizes_of({"outline: ", false}, key, scheme, shape, rows);
  const auto meta = at::TensorOptions().device(at::kMeta);
  return {scheme, shape, at::empty({sizes.rows, sizes.width}, meta.dtype(at::kChar)),
          at::empty({sizes.scale_rows(), sizes.grid.blocks(sizes.width), sizes.grid.params()},
                    meta.dtype(at::kFloat))};
}

}  // namespace qat
