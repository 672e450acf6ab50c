#include "attend.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace qat::models {
namespace {

constexpr int64_t kPositions = 2;  // the dimension S

at::Tensor product(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const std::optional<at::Tensor>& mask, bool causal, double scale) {
  return at::scaled_dot_product_attention(q, k, v, mask, /*dropout_p=*/0.0, causal, scale,
                                          /*enable_gqa=*/q.size(1) != k.size(1));
}

/// bool[queries, keys]: which of the keys each query reads; the last query stands at the last key.
at::Tensor visible(int64_t queries, int64_t keys, int64_t window, at::Device device) {
  const auto positions = at::TensorOptions().dtype(at::kLong).device(device);
  const at::Tensor query = at::arange(keys - queries, keys, positions).unsqueeze(1);
  const at::Tensor distance = query - at::arange(keys, positions);
  const at::Tensor causal = distance >= 0;
  return window > 0 ? causal.logical_and(distance < window) : causal;
}

/// `window` queries at a time, each block with the 2 * window - 1 keys that its queries can reach: one mask
/// serves all blocks behind the first.
at::Tensor in_blocks(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t window,
                     double scale) {
  const int64_t tokens = q.size(kPositions);
  const auto part = [](const at::Tensor& tensor, int64_t begin, int64_t end) {
    return tensor.narrow(kPositions, begin, end - begin);
  };
  std::vector<at::Tensor> blocks{product(part(q, 0, window), part(k, 0, window), part(v, 0, window), {},
                                         /*causal=*/true, scale)};
  const at::Tensor mask = visible(window, 2 * window - 1, window, q.device());
  for (int64_t begin = window; begin < tokens; begin += window) {
    const int64_t end = std::min(begin + window, tokens), first = begin - window + 1;
    const at::Tensor seen = mask.narrow(0, 0, end - begin).narrow(1, 0, end - first);
    blocks.push_back(product(part(q, begin, end), part(k, first, end), part(v, first, end), seen,
                             /*causal=*/false, scale));
  }
  return at::cat(blocks, kPositions);
}

}  // namespace

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t window,
                  double scale) {
  const int64_t queries = q.size(kPositions), keys = k.size(kPositions);
  const bool bounded = window > 0 && window < keys;
  if (queries == keys) {
    return bounded ? in_blocks(q, k, v, window, scale) : product(q, k, v, {}, /*causal=*/true, scale);
  }
  if (queries == 1 && !bounded) return product(q, k, v, {}, /*causal=*/false, scale);
  return product(q, k, v, visible(queries, keys, bounded ? window : 0, q.device()), /*causal=*/false, scale);
}

}  // namespace qat::models
