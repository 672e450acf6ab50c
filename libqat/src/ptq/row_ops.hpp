#pragma once

// The inner loops of coordinate descent, compiled for the processor's widest vectors and chosen at run time.
// No products are fused and sums have a fixed order, so all processors compute the same bits.

#include <cstdint>

namespace qat::ptq {

/// to[k] += factor * from[k]
void add_scaled(const float* from, int64_t n, float factor, float* to);

/// to[k] -= sum over i < count of factors[i] * h[i * stride + k], for k < n.
void subtract_rows(const float* h, int64_t stride, const float* factors, int64_t count, int64_t n, float* to);

/// sum over i of a[i] * b[i]
double dot(const float* a, const float* b, int64_t n);

/// sum over i, k < n of a[i] * h[i * stride + k] * b[k]
double bilinear(const float* a, const float* h, int64_t stride, const float* b, int64_t n);

}  // namespace qat::ptq
