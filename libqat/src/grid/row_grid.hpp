#pragma once

// Turns a codec (one header per number format) into a Grid.

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "grid/row_kernels.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/bf16.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/gradient.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// A codec that handles a block at once: what a code means depends on its place in the block.
template <class Codec>
concept BlockCodec = requires(const Codec& codec, const float* w, float* s, int8_t* codes) {
  codec.encode_block(w, int64_t{}, s, codes);
};

/// A codec that can find better scales than its rule does.
template <class Codec>
concept SearchingCodec =
    requires(const Codec& codec, const float* w, float* s) { codec.search(w, int64_t{}, s); };

/// A codec whose rule has a gradient.
template <class Codec>
concept DifferentiableCodec =
    requires(const Codec& codec, const float* w, const float* grad_s, float* grad_w) {
      codec.choose_backward(w, int64_t{}, grad_s, grad_w);
    };

/// A codec whose constants are known when it is made, not when it is compiled.
template <class Codec>
concept RuntimeCodec = requires(const Codec& codec) { codec.info(); };

/// A grid with codes, from a codec of one block of n weights: `kInfo` (or `info()`), `choose(w, n, s)`,
/// `store(s, stored)`, optionally `search(w, n, s)`, and either `encoder(s)` with `encode(w, encoder)`,
/// `decode(code, stored)`, `in_range(w, encoder)` for each weight, or `encode_block(w, n, s, codes)`,
/// `decode_block(codes, n, stored, w_hat)`, `in_range_block(w, n, s, mask)`.
template <class Codec>
class RowGrid final : public Grid {
 public:
  explicit RowGrid(RowKernels kernels, Codec codec = {}) : kernels_(kernels), codec_(std::move(codec)) {}

  const Info& info() const noexcept override {
    if constexpr (RuntimeCodec<Codec>) {
      return codec_.info();
    } else {
      return Codec::kInfo;
    }
  }

  Status choose(const float* w, int64_t n, float* s) const override {
    if (kernels_.choose != nullptr) return kernels_.choose(&codec_, w, n, s);
    return each_block(
        w, n, s, [this](const float* block, int64_t step, float* to) { codec_.choose(block, step, to); });
  }

  Status search(const float* w, int64_t n, float* s) const override {
    if (kernels_.search != nullptr) return kernels_.search(&codec_, w, n, s);
    return each_block(w, n, s, [this](const float* block, int64_t step, float* to) {
      scales_of_block(ScaleRule::kSearch, block, step, to);
    });
  }

  Status store(const float* s, int64_t n, float* stored) const override {
    const int count = params();
    Status worst = Status::kOk;
    for (int64_t b = 0; b < blocks(n); ++b) {
      const Status status = codec_.store(s + b * count, stored + b * count);
      if (worst != Status::kNotFinite && status != Status::kOk) worst = status;
    }
    return worst;
  }

  void encode(const float* w, int64_t n, const float* s, int8_t* codes) const override {
    const int64_t step = block(n);
    const int count = params();
    for (int64_t b = 0; b < blocks(n); ++b) {
      encode_block(w + b * step, step, s + b * count, codes + b * step);
    }
  }

  void decode(const int8_t* codes, int64_t n, const float* stored, float* w_hat) const override {
    const int64_t step = block(n);
    const int count = params();
    for (int64_t b = 0; b < blocks(n); ++b) {
      decode_block(codes + b * step, step, stored + b * count, w_hat + b * step);
    }
  }

  void in_range(const float* w, int64_t n, const float* s, uint8_t* mask) const override {
    const int64_t step = block(n);
    const int count = params();
    for (int64_t b = 0; b < blocks(n); ++b) {
      const float* block_w = w + b * step;
      if constexpr (BlockCodec<Codec>) {
        codec_.in_range_block(block_w, step, s + b * count, mask + b * step);
      } else {
        const auto encoder = codec_.encoder(s + b * count);
        for (int64_t i = 0; i < step; ++i) {
          mask[b * step + i] = codec_.in_range(block_w[i], encoder) ? 1 : 0;
        }
      }
    }
  }

  Status fake_quantize(const float* w, int64_t n, float* w_hat, ScaleRule rule) const override {
    const auto kernel = rule == ScaleRule::kSearch ? kernels_.f32_search : kernels_.f32;
    if (kernel != nullptr) return kernel(&codec_, w, n, w_hat);
    return quantize_row(w, n, rule, [w_hat](int64_t i, float value) { w_hat[i] = value; });
  }

  Status fake_quantize_bf16(const float* w, int64_t n, uint16_t* w_hat, ScaleRule rule) const override {
    const auto kernel = rule == ScaleRule::kSearch ? kernels_.bf16_search : kernels_.bf16;
    if (kernel != nullptr) return kernel(&codec_, w, n, w_hat);
    return quantize_row(w, n, rule, [w_hat](int64_t i, float value) { w_hat[i] = bf16_bits(value); });
  }

  Status fake_quantize_with(const float* w, int64_t n, const float* s, float* w_hat) const override {
    if (kernels_.f32_held != nullptr) return kernels_.f32_held(&codec_, w, n, s, w_hat);
    return quantize_with(w, n, s, [w_hat](int64_t i, float value) { w_hat[i] = value; });
  }

  Status fake_quantize_bf16_with(const float* w, int64_t n, const float* s, uint16_t* w_hat) const override {
    if (kernels_.bf16_held != nullptr) return kernels_.bf16_held(&codec_, w, n, s, w_hat);
    return quantize_with(w, n, s, [w_hat](int64_t i, float value) { w_hat[i] = bf16_bits(value); });
  }

  Status backward(const float* w, int64_t n, const float* s, const float* g, EstimatorKind kind,
                  float* grad_w, float* grad_s) const override {
    if (kind == EstimatorKind::kSte && grad_s == nullptr) {
      if (!all_finite(w, n)) return Status::kNotFinite;
      if (grad_w != nullptr && grad_w != g) std::copy_n(g, n, grad_w);
      return Status::kOk;
    }
    if (kernels_.backward != nullptr) return kernels_.backward(&codec_, w, n, s, g, kind, grad_w, grad_s);
    if (!all_finite(w, n)) return Status::kNotFinite;
    return backward_row<float>(
        codec_, block(n), params(), kind, n, s, {w, g, grad_w, 0.0F}, grad_s,
        [](const Codec& codec, const float* of, float* to) { return codec.store(of, to); });
  }

  bool rule_has_gradient() const noexcept override { return DifferentiableCodec<Codec>; }

  Status choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) const override {
    if constexpr (DifferentiableCodec<Codec>) {
      if (!all_finite(w, n)) return Status::kNotFinite;
      const int64_t step = block(n);
      for (int64_t b = 0; b < blocks(n); ++b) {
        codec_.choose_backward(w + b * step, step, grad_s + b * params(), grad_w + b * step);
      }
      return Status::kOk;
    } else {
      throw UnsupportedError("grid: " + std::string(info().name) +
                             ": expected a grid whose scale rule has a gradient, got none");
    }
  }

 private:
  template <class Function>
  Status each_block(const float* w, int64_t n, float* s, const Function& function) const {
    if (!all_finite(w, n)) return Status::kNotFinite;
    const int64_t step = block(n);
    const int count = params();
    for (int64_t b = 0; b < blocks(n); ++b) function(w + b * step, step, s + b * count);
    return Status::kOk;
  }

  void scales_of_block(ScaleRule rule, const float* w, int64_t step, float* s) const {
    if constexpr (SearchingCodec<Codec>) {
      if (rule == ScaleRule::kSearch) return codec_.search(w, step, s);
    }
    codec_.choose(w, step, s);
  }

  void encode_block(const float* w, int64_t step, const float* s, int8_t* codes) const {
    if constexpr (BlockCodec<Codec>) {
      codec_.encode_block(w, step, s, codes);
    } else {
      const auto encoder = codec_.encoder(s);
      for (int64_t i = 0; i < step; ++i) codes[i] = static_cast<int8_t>(codec_.encode(w[i], encoder));
    }
  }

  void decode_block(const int8_t* codes, int64_t step, const float* stored, float* w_hat) const {
    if constexpr (BlockCodec<Codec>) {
      codec_.decode_block(codes, step, stored, w_hat);
    } else {
      for (int64_t i = 0; i < step; ++i) w_hat[i] = codec_.decode(codes[i], stored);
    }
  }

  template <class Put>
  Status quantize_row(const float* w, int64_t n, ScaleRule rule, Put put) const {
    if (!all_finite(w, n)) return Status::kNotFinite;
    const int64_t step = block(n);
    std::array<float, kMaxParams> s;
    std::array<float, kMaxParams> stored;
    for (int64_t b = 0; b < blocks(n); ++b) {
      scales_of_block(rule, w + b * step, step, s.data());
      const Status status = codec_.store(s.data(), stored.data());
      if (status != Status::kOk) return status;
      quantize_block(w + b * step, step, s.data(), stored.data(), b * step, put);
    }
    return Status::kOk;
  }

  template <class Put>
  Status quantize_with(const float* w, int64_t n, const float* s, Put put) const {
    if (!all_finite(w, n)) return Status::kNotFinite;
    const int64_t step = block(n);
    const int count = params();
    std::array<float, kMaxParams> stored;
    Status worst = Status::kOk;
    for (int64_t b = 0; b < blocks(n); ++b) {
      worst = worse(worst, codec_.store(s + b * count, stored.data()));
      if (worst != Status::kOk) continue;
      quantize_block(w + b * step, step, s + b * count, stored.data(), b * step, put);
    }
    return worst;
  }

  template <class Put>
  void quantize_block(const float* w, int64_t step, const float* s, const float* stored, int64_t first,
                      Put put) const {
    if constexpr (BlockCodec<Codec>) {
      std::array<int8_t, Codec::kInfo.block> codes;
      std::array<float, Codec::kInfo.block> w_hat;
      codec_.encode_block(w, step, s, codes.data());
      codec_.decode_block(codes.data(), step, stored, w_hat.data());
      for (int64_t i = 0; i < step; ++i) put(first + i, w_hat[static_cast<size_t>(i)]);
    } else {
      const auto encoder = codec_.encoder(s);
      for (int64_t i = 0; i < step; ++i) put(first + i, codec_.decode(codec_.encode(w[i], encoder), stored));
    }
  }

  RowKernels kernels_;
  Codec codec_;
};

}  // namespace qat::grid
