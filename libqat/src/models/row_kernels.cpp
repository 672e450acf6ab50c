#include "row_kernels.hpp"

#include <cmath>

#include "core/clones.hpp"
#include "qat/grid/bf16.hpp"

namespace qat::models::kernels {
namespace {

/// Sums are kept in this many lanes, so that they vectorise without reordering anything.
constexpr int64_t kLanes = 16;

QAT_INLINE float load(const float* x) {
  return *x;
}
QAT_INLINE float load(const BFloat16Bits* x) {
  return grid::bf16_value(*x);
}
QAT_INLINE void store(float value, float* y) {
  *y = value;
}
QAT_INLINE void store(float value, BFloat16Bits* y) {
  *y = grid::bf16_bits(value);
}

/// Sum over i of term(i).
template <class Term>
QAT_INLINE float sum(int64_t n, Term term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (; i < n; ++i) lanes[i % kLanes] += term(i);
  float total = 0.0F;
  for (const float lane : lanes) total += lane;
  return total;
}

/// e^x within 2 units in the last place for |x| <= 87; beyond, as at the border. NaN stays NaN. (Argument
/// reduction by ln 2 in two parts, then the Taylor polynomial on |r| <= ln(2)/2; Cody and Waite 1980.)
QAT_INLINE float exponential(float x) {
  constexpr float kShift = 12582912.0F;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  x = x < -87.0F ? -87.0F : x;
  x = x > 87.0F ? 87.0F : x;
  const float shifted = x * 1.44269504F + kShift;
  const float whole = shifted - kShift;
  const float r = (x - whole * 0.693359375F) + whole * 2.12194440e-4F;
  float p = 1.0F / 5040.0F;
  p = p * r + 1.0F / 720.0F;
  p = p * r + 1.0F / 120.0F;
  p = p * r + 1.0F / 24.0F;
  p = p * r + 1.0F / 6.0F;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const uint32_t scale = (grid::bits_of(shifted) + 127U) << 23;
  return p * grid::float_of(scale);
}

QAT_INLINE float sigmoid(float x) {
  return 1.0F / (1.0F + exponential(-x));
}

template <class T>
QAT_INLINE float rms_norm_row(const float* x, const float* w, int64_t n, float eps, T* y) {
  const float squares = sum(n, [&](int64_t i) __attribute__((always_inline)) { return x[i] * x[i]; });
  const float r = 1.0F / std::sqrt(squares / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) store(w[i] * (x[i] * r), y + i);
  return r;
}

template <class T>
QAT_INLINE void rms_norm_backward_row(const float* x, const float* w, const T* grad_y, int64_t n, float r,
                                      float* grad_x, float* grad_w) {
  const float dot =
      sum(n, [&](int64_t i) __attribute__((always_inline)) { return load(grad_y + i) * w[i] * x[i]; });
  const float pull = dot * r * r * r / static_cast<float>(n);
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(grad_y + i);
    grad_w[i] += g * (x[i] * r);
    grad_x[i] = g * w[i] * r - x[i] * pull;
  }
}

template <class T>
QAT_INLINE void rotate_head(const T* x, const float* cos, const float* sin, int64_t half, T* y) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = load(x + i);
    const float second = load(x + half + i);
    store(first * cos[i] - second * sin[i], y + i);
    store(second * cos[i] + first * sin[i], y + half + i);
  }
}

/// An activation g * sigmoid(z(g)): z, and its derivative.
struct Silu {
  static QAT_INLINE float inner(float g) { return g; }
  static QAT_INLINE float slope(float) { return 1.0F; }
};

/// By 1 + tanh(u) = 2 sigmoid(2u).
struct GeluTanh {
  static constexpr float kLinear = 1.5957691216F;  // 2 sqrt(2/pi)
  static constexpr float kCubic = kLinear * 0.044715F;
  static QAT_INLINE float inner(float g) { return g * (kLinear + kCubic * g * g); }
  static QAT_INLINE float slope(float g) { return kLinear + 3.0F * kCubic * g * g; }
};

template <class Activation, class T>
QAT_INLINE void gated_row(const T* gate, const T* up, int64_t n, T* y) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(gate + i);
    store(g * sigmoid(Activation::inner(g)) * load(up + i), y + i);
  }
}

template <class Activation, class T>
QAT_INLINE void gated_backward_row(const T* gate, const T* up, const T* grad_y, int64_t n, T* grad_gate,
                                   T* grad_up) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(gate + i);
    const float s = sigmoid(Activation::inner(g));
    const float grad = load(grad_y + i);
    store(grad * g * s, grad_up + i);
    // Far from 0 the factor 1 - s is exactly 0 before the slope overflows.
    const float bend = 1.0F - s == 0.0F ? 0.0F : g * (1.0F - s) * Activation::slope(g);
    store(grad * load(up + i) * (s * (1.0F + bend)), grad_gate + i);
  }
}

}  // namespace

QAT_CLONES float rms_norm(const float* x, const float* w, int64_t n, float eps, float* y) {
  return rms_norm_row(x, w, n, eps, y);
}

QAT_CLONES float rms_norm(const float* x, const float* w, int64_t n, float eps, BFloat16Bits* y) {
  return rms_norm_row(x, w, n, eps, y);
}

QAT_CLONES void rms_norm_backward(const float* x, const float* w, const float* grad_y, int64_t n, float r,
                                  float* grad_x, float* grad_w) {
  rms_norm_backward_row(x, w, grad_y, n, r, grad_x, grad_w);
}

QAT_CLONES void rms_norm_backward(const float* x, const float* w, const BFloat16Bits* grad_y, int64_t n,
                                  float r, float* grad_x, float* grad_w) {
  rms_norm_backward_row(x, w, grad_y, n, r, grad_x, grad_w);
}

QAT_CLONES void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* y) {
  rotate_head(x, cos, sin, half, y);
}

QAT_CLONES void rotate(const BFloat16Bits* x, const float* cos, const float* sin, int64_t half,
                       BFloat16Bits* y) {
  rotate_head(x, cos, sin, half, y);
}

QAT_CLONES void silu_mul(const float* gate, const float* up, int64_t n, float* y) {
  gated_row<Silu>(gate, up, n, y);
}

QAT_CLONES void silu_mul(const BFloat16Bits* gate, const BFloat16Bits* up, int64_t n, BFloat16Bits* y) {
  gated_row<Silu>(gate, up, n, y);
}

QAT_CLONES void silu_mul_backward(const float* gate, const float* up, const float* grad_y, int64_t n,
                                  float* grad_gate, float* grad_up) {
  gated_backward_row<Silu>(gate, up, grad_y, n, grad_gate, grad_up);
}

QAT_CLONES void silu_mul_backward(const BFloat16Bits* gate, const BFloat16Bits* up,
                                  const BFloat16Bits* grad_y, int64_t n, BFloat16Bits* grad_gate,
                                  BFloat16Bits* grad_up) {
  gated_backward_row<Silu>(gate, up, grad_y, n, grad_gate, grad_up);
}

QAT_CLONES void gelu_mul(const float* gate, const float* up, int64_t n, float* y) {
  gated_row<GeluTanh>(gate, up, n, y);
}

QAT_CLONES void gelu_mul(const BFloat16Bits* gate, const BFloat16Bits* up, int64_t n, BFloat16Bits* y) {
  gated_row<GeluTanh>(gate, up, n, y);
}

QAT_CLONES void gelu_mul_backward(const float* gate, const float* up, const float* grad_y, int64_t n,
                                  float* grad_gate, float* grad_up) {
  gated_backward_row<GeluTanh>(gate, up, grad_y, n, grad_gate, grad_up);
}

QAT_CLONES void gelu_mul_backward(const BFloat16Bits* gate, const BFloat16Bits* up,
                                  const BFloat16Bits* grad_y, int64_t n, BFloat16Bits* grad_gate,
                                  BFloat16Bits* grad_up) {
  gated_backward_row<GeluTanh>(gate, up, grad_y, n, grad_gate, grad_up);
}

}  // namespace qat::models::kernels
