#include "qat/ops/sample.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/softmax.h>

#include <algorithm>
#include <vector>

#include "ops/check.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

/// Probabilities that exist at a time: 32 MB of sums, not a vocabulary for each token of a long text.
constexpr int64_t kTogether = int64_t{1} << 22;

void check(const at::Tensor& logits, const at::Tensor& uniform) {
  if (logits.dim() != 2 || !logits.is_floating_point() || logits.size(1) == 0) {
    ops::fail({"sample", "logits"}, "floats [n, V]", ops::describe(logits));
  }
  if (uniform.scalar_type() != at::kDouble || uniform.sizes() != at::IntArrayRef({logits.size(0)})) {
    ops::fail({"sample", "uniform"}, "float64[n], one for each row of logits", ops::describe(uniform));
  }
}

at::Tensor drawn(const at::Tensor& logits, const at::Tensor& uniform) {
  const at::ScalarType dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor sums = at::softmax(logits, -1, dtype).cumsum(-1, at::kDouble);
  const at::Tensor total = sums.narrow(-1, sums.size(-1) - 1, 1);
  if (!total.isfinite().all().item<bool>()) {
    throw NumericError("sample: logits: expected finite ones, got others");
  }
  const at::Tensor at = uniform.to(total.device()).unsqueeze(1) * total;
  const at::Tensor found = at::searchsorted(sums, at, /*out_int32=*/false, /*right=*/true);
  return found.squeeze(1).clamp_max(logits.size(-1) - 1);
}

}  // namespace

at::Tensor sample(const at::Tensor& logits, const at::Tensor& uniform) {
  check(logits, uniform);
  const at::NoGradGuard no_grad;
  const int64_t rows = std::max<int64_t>(1, kTogether / logits.size(1));
  const std::vector<at::Tensor> parts = logits.detach().split(rows), numbers = uniform.split(rows);
  std::vector<at::Tensor> found;
  for (size_t i = 0; i < parts.size(); ++i) found.push_back(drawn(parts[i], numbers[i]));
  return at::cat(found);
}

}  // namespace qat
