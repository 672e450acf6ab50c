#include "ptq/symmetric_sums.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace qat::ptq {
namespace {

/// Rows of the sum that are formed together: less, and the products are too narrow to be fast.
constexpr int64_t kPanel = 192;

}  // namespace

void add_products(const at::Tensor& sum, const at::Tensor& rows, double factor) {
  const int64_t n = rows.size(1);
  const bool in_place = rows.scalar_type() == sum.scalar_type() && rows.device() == sum.device();
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t count = std::min(kPanel, n - first);
    const at::Tensor panel = sum.narrow(0, first, count).narrow(1, first, n - first);
    const at::Tensor left = rows.narrow(1, first, count).t(), right = rows.narrow(1, first, n - first);
    if (in_place) {
      panel.addmm_(left, right, 1, factor);
    } else {
      panel.add_(at::mm(left, right).to(sum.options()), factor);
    }
  }
}

at::Tensor from_upper(const at::Tensor& sums) {
  const at::Tensor upper = sums.triu();
  return upper + upper.triu(1).transpose(-2, -1);
}

}  // namespace qat::ptq
