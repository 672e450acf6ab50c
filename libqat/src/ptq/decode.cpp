#include "ptq/decode.hpp"

#include <ATen/ops/empty_like.h>

#include "ptq/check.hpp"

namespace qat::ptq {

at::Tensor decoded(std::string_view function, std::string_view tensor, const grid::Grid& grid,
                   const at::Tensor& latent, const at::Tensor& scales) {
  at::Tensor result = at::empty_like(latent);
  const int64_t n = latent.size(1);
  const int64_t row_scales = scales.size(0) == latent.size(0) ? scales.numel() / scales.size(0) : 0;
  const float* w = latent.const_data_ptr<float>();
  const float* s = scales.const_data_ptr<float>();
  float* w_hat = result.mutable_data_ptr<float>();
  for_each_row(Subject{function, tensor}, latent.size(0), n, [&] {
    return [&](int64_t row) {
      return grid.fake_quantize_with(w + row * n, n, s + row * row_scales, w_hat + row * n);
    };
  });
  return result;
}

}  // namespace qat::ptq
