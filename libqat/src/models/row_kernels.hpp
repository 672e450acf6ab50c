#pragma once

// The element-wise work between a decoder's matrix products, on raw rows: arithmetic in float32, storage in
// float32 or bfloat16 (bits in uint16_t). Each function is compiled for several instruction sets and the
// loader of the program picks one; the results do not depend on the choice (no contraction, fixed lanes).

#include <cstdint>

namespace qat::models::kernels {

using BFloat16Bits = uint16_t;

/// y[i] = w[i] * x[i] * r with r = 1 / sqrt(mean(x^2) + eps), which is returned. x, w: float32[n], y: [n].
float rms_norm(const float* x, const float* w, int64_t n, float eps, float* y);
float rms_norm(const float* x, const float* w, int64_t n, float eps, BFloat16Bits* y);

/// Gradients of one row of `rms_norm`. grad_y: [n], r: its return value -> grad_x: float32[n]; grad_w[n] is
/// added to.
void rms_norm_backward(const float* x, const float* w, const float* grad_y, int64_t n, float r, float* grad_x,
                       float* grad_w);
void rms_norm_backward(const float* x, const float* w, const BFloat16Bits* grad_y, int64_t n, float r,
                       float* grad_x, float* grad_w);

/// Rotates the pairs (x[i], x[i + half]) by the angles with the given cosines and sines; one head.
/// x, y: [2 * half], cos, sin: float32[half].
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* y);
void rotate(const BFloat16Bits* x, const float* cos, const float* sin, int64_t half, BFloat16Bits* y);

/// y[i] = gate[i] * sigmoid(gate[i]) * up[i].
void silu_mul(const float* gate, const float* up, int64_t n, float* y);
void silu_mul(const BFloat16Bits* gate, const BFloat16Bits* up, int64_t n, BFloat16Bits* y);

void silu_mul_backward(const float* gate, const float* up, const float* grad_y, int64_t n, float* grad_gate,
                       float* grad_up);
void silu_mul_backward(const BFloat16Bits* gate, const BFloat16Bits* up, const BFloat16Bits* grad_y,
                       int64_t n, BFloat16Bits* grad_gate, BFloat16Bits* grad_up);

/// y[i] = gelu(gate[i]) * up[i], with gelu(g) = g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3))).
void gelu_mul(const float* gate, const float* up, int64_t n, float* y);
void gelu_mul(const BFloat16Bits* gate, const BFloat16Bits* up, int64_t n, BFloat16Bits* y);

void gelu_mul_backward(const float* gate, const float* up, const float* grad_y, int64_t n, float* grad_gate,
                       float* grad_up);
void gelu_mul_backward(const BFloat16Bits* gate, const BFloat16Bits* up, const BFloat16Bits* grad_y,
                       int64_t n, BFloat16Bits* grad_gate, BFloat16Bits* grad_up);

}  // namespace qat::models::kernels
