#pragma once

// Turns the codec of a float type into a Grid.

#include <algorithm>

#include "qat/grid/bf16.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// A grid without codes and scales: each value is rounded on its own. Codec: kInfo, round.
template <class Codec>
class FloatGrid final : public Grid {
 public:
  const Info& info() const noexcept override { return Codec::kInfo; }

  Status choose(const float* w, int64_t n, float*) const override {
    return round_row(w, n, [](int64_t, float) { return true; });
  }
  Status search(const float* w, int64_t n, float* s) const override { return choose(w, n, s); }
  Status store(const float*, int64_t, float*) const override { return Status::kOk; }
  void encode(const float*, int64_t, const float*, int8_t*) const override {}
  void decode(const int8_t*, int64_t, const float*, float*) const override {}
  void in_range(const float*, int64_t n, const float*, uint8_t* mask) const override {
    std::fill_n(mask, n, uint8_t{1});
  }

  Status fake_quantize(const float* w, int64_t n, float* w_hat, ScaleRule) const override {
    return round_row(w, n, [w_hat](int64_t i, float value) {
      w_hat[i] = value;
      return true;
    });
  }

  Status fake_quantize_bf16(const float* w, int64_t n, uint16_t* w_hat, ScaleRule) const override {
    return round_row(w, n, [w_hat](int64_t i, float value) {
      w_hat[i] = bf16_bits(value);
      return is_finite(bf16_value(w_hat[i]));
    });
  }

  Status fake_quantize_with(const float* w, int64_t n, const float*, float* w_hat) const override {
    return fake_quantize(w, n, w_hat, ScaleRule::kReference);
  }
  Status fake_quantize_bf16_with(const float* w, int64_t n, const float*, uint16_t* w_hat) const override {
    return fake_quantize_bf16(w, n, w_hat, ScaleRule::kReference);
  }

  Status backward(const float* w, int64_t n, const float*, const float* g, EstimatorKind, float* grad_w,
                  float*) const override {
    if (!all_finite(w, n)) return Status::kNotFinite;
    if (grad_w != nullptr && grad_w != g) std::copy_n(g, n, grad_w);
    return Status::kOk;
  }

  bool rule_has_gradient() const noexcept override { return true; }
  Status choose_backward(const float* w, int64_t n, const float*, float*) const override {
    return all_finite(w, n) ? Status::kOk : Status::kNotFinite;
  }

 private:
  /// put returns whether the value fits where it was put.
  template <class Put>
  static Status round_row(const float* w, int64_t n, Put put) {
    if (!all_finite(w, n)) return Status::kNotFinite;
    bool fits = true;
    for (int64_t i = 0; i < n; ++i) {
      const float rounded = Codec::round(w[i]);
      fits &= is_finite(rounded);
      fits &= put(i, rounded);
    }
    return fits ? Status::kOk : Status::kOverflow;
  }
};

}  // namespace qat::grid
