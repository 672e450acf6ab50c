#include "qat/ptq/weighted_search.hpp"

#include <ATen/ops/min.h>

#include "ptq/check.hpp"
#include "ptq/scales.hpp"

namespace qat::ptq {

at::Tensor weighted_search(const at::Tensor& weight, const at::Tensor& importance, std::string_view grid,
                           std::string_view tensor, bool seq) {
  const Subject subject{"weighted_search", tensor};
  const grid::Grid& found = check_coded(subject, weight, grid);
  const at::Tensor rows = rows_of(weight);
  const at::Tensor counted = checked_statistics(subject, "importance", importance, {rows.size(1)});
  if (const double least = at::min(counted).item<double>(); least < 0.0) {
    fail(subject, "an importance of at least 0", std::to_string(least));
  }
  const ScaleChoice choice{ScaleSource::kWeighted, seq};
  return choose_scales(subject.op, tensor, found, choice, rows, counted).to(weight.device());
}

}  // namespace qat::ptq
