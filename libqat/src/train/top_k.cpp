#include "train/top_k.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/topk.h>

#include <algorithm>
#include <limits>

#include "train/answer.hpp"

namespace qat::train {

WindowAnswer top_outcomes(const TeacherAnswer& answer, const CacheKey& key) {
  const at::Tensor& any = answer.hidden.defined() ? answer.hidden : answer.logits;
  const int64_t windows = any.size(0), positions = key.length - 1, total = windows * positions;
  const WindowAnswer result{at::empty({total, key.top_k}, at::kLong),
                            at::empty({total, key.top_k + 1}, at::kFloat)};
  TeacherRows teacher(answer, positions);
  const int64_t height = piece_height(0, total, key.vocabulary);
  for (int64_t first = 0; first < total; first += height) {
    const int64_t last = std::min(first + height, total);
    at::Tensor log_p = log_probabilities(teacher.rows(first, last).logits, at::kFloat, key.temperature);
    const at::Tensor found = std::get<1>(at::topk(log_p, key.top_k, -1, /*largest=*/true, /*sorted=*/false));
    const at::Tensor ids = std::get<0>(found.sort(-1));
    const at::Tensor top = log_p.gather(1, ids);
    log_p.scatter_(1, ids, -std::numeric_limits<double>::infinity());
    result.ids.slice(0, first, last).copy_(ids);
    // A sum of rounded exponentials may exceed 1 by a little.
    const at::Tensor rest = at::logsumexp(log_p, 1, /*keepdim=*/true).clamp_max_(0);
    result.log_p.slice(0, first, last).copy_(at::cat({top, rest}, 1));
  }
  return {result.ids.view({windows, positions, key.top_k}),
          result.log_p.view({windows, positions, key.top_k + 1})};
}

}  // namespace qat::train
