#pragma once

// Turns a codec (one header per number format) into a Grid.

#include <algorithm>
#include <array>

#include "grid/row_kernels.hpp"
#include "qat/grid/bf16.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// A grid with codes. Codec: kInfo, choose, store, encoder, encode, decode, in_range on one block.
template <class Codec>
class RowGrid final : public Grid {
 public:
  explicit RowGrid(RowKernels kernels) : kernels_(kernels) {}

  const Info& info() const noexcept override { return Codec::kInfo; }

  Status choose(const float* w, int64_t n, float* s) const override {
    if (!all_finite(w, n)) return Status::kNotFinite;
    const int64_t step = block(n);
    for (int64_t b = 0; b < blocks(n); ++b) Codec::choose(w + b * step, step, s + b * kParams);
    return Status::kOk;
  }

  Status store(const float* s, int64_t n, float* stored) const override {
    Status worst = Status::kOk;
    for (int64_t b = 0; b < blocks(n); ++b) {
      const Status status = Codec::store(s + b * kParams, stored + b * kParams);
      if (worst != Status::kNotFinite && status != Status::kOk) worst = status;
    }
    return worst;
  }

  void encode(const float* w, int64_t n, const float* s, int8_t* codes) const override {
    const int64_t step = block(n);
    for (int64_t b = 0; b < blocks(n); ++b) {
      const auto encoder = Codec::encoder(s + b * kParams);
      for (int64_t i = b * step; i < (b + 1) * step; ++i) {
        codes[i] = static_cast<int8_t>(Codec::encode(w[i], encoder));
      }
    }
  }

  void decode(const int8_t* codes, int64_t n, const float* stored, float* w_hat) const override {
    const int64_t step = block(n);
    for (int64_t b = 0; b < blocks(n); ++b) {
      for (int64_t i = b * step; i < (b + 1) * step; ++i) {
        w_hat[i] = Codec::decode(codes[i], stored + b * kParams);
      }
    }
  }

  void in_range(const float* w, int64_t n, const float* s, uint8_t* mask) const override {
    const int64_t step = block(n);
    for (int64_t b = 0; b < blocks(n); ++b) {
      const auto encoder = Codec::encoder(s + b * kParams);
      for (int64_t i = b * step; i < (b + 1) * step; ++i) mask[i] = Codec::in_range(w[i], encoder) ? 1 : 0;
    }
  }

  Status fake_quantize(const float* w, int64_t n, float* w_hat) const override {
    if (kernels_.f32 != nullptr) return kernels_.f32(w, n, w_hat);
    return quantize_row(w, n, [w_hat](int64_t i, float value) { w_hat[i] = value; });
  }

  Status fake_quantize_bf16(const float* w, int64_t n, uint16_t* w_hat) const override {
    if (kernels_.bf16 != nullptr) return kernels_.bf16(w, n, w_hat);
    return quantize_row(w, n, [w_hat](int64_t i, float value) { w_hat[i] = bf16_bits(value); });
  }

 private:
  static constexpr int kParams = [] {
    int total = 0;
    for (const Field& field : Codec::kInfo.fields) total += field.count;
    return total;
  }();

  template <class Put>
  Status quantize_row(const float* w, int64_t n, Put put) const {
    if (!all_finite(w, n)) return Status::kNotFinite;
    const int64_t step = block(n);
    std::array<float, kParams> s;
    std::array<float, kParams> stored;
    for (int64_t b = 0; b < blocks(n); ++b) {
      Codec::choose(w + b * step, step, s.data());
      const Status status = Codec::store(s.data(), stored.data());
      if (status != Status::kOk) return status;
      const auto encoder = Codec::encoder(s.data());
      for (int64_t i = b * step; i < (b + 1) * step; ++i) {
        put(i, Codec::decode(Codec::encode(w[i], encoder), stored.data()));
      }
    }
    return Status::kOk;
  }

  RowKernels kernels_;
};

/// A grid without codes and scales: each value is rounded on its own. Codec: kInfo, round.
template <class Codec>
class FloatGrid final : public Grid {
 public:
  const Info& info() const noexcept override { return Codec::kInfo; }

  Status choose(const float* w, int64_t n, float*) const override {
    return round_row(w, n, [](int64_t, float) { return true; });
  }
  Status store(const float*, int64_t, float*) const override { return Status::kOk; }
  void encode(const float*, int64_t, const float*, int8_t*) const override {}
  void decode(const int8_t*, int64_t, const float*, float*) const override {}
  void in_range(const float*, int64_t n, const float*, uint8_t* mask) const override {
    std::fill_n(mask, n, uint8_t{1});
  }

  Status fake_quantize(const float* w, int64_t n, float* w_hat) const override {
    return round_row(w, n, [w_hat](int64_t i, float value) {
      w_hat[i] = value;
      return true;
    });
  }

  Status fake_quantize_bf16(const float* w, int64_t n, uint16_t* w_hat) const override {
    return round_row(w, n, [w_hat](int64_t i, float value) {
      w_hat[i] = bf16_bits(value);
      return is_finite(bf16_value(w_hat[i]));
    });
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
