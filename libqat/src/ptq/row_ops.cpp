#include "ptq/row_ops.hpp"

#include <algorithm>
#include <array>

#include "core/clones.hpp"

namespace qat::ptq {
namespace {

/// Sums are kept in this many lanes, so that they vectorise without reordering anything.
constexpr int64_t kLanes = 8;
/// Columns of a product with h that are summed together.
constexpr int64_t kColumns = 64;

QAT_INLINE double dot_of(const float* a, const float* b, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
    }
  }
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  for (; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

}  // namespace

QAT_CLONES void add_scaled(const float* from, int64_t n, float factor, float* to) {
  for (int64_t k = 0; k < n; ++k) to[k] += factor * from[k];
}

QAT_CLONES void subtract_rows(const float* h, int64_t stride, const float* factors, int64_t count, int64_t n,
                              float* to) {
  std::array<const float*, 4> rows{};
  std::array<float, 4> f{};
  size_t held = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (factors[i] == 0.0F) continue;
    rows[held] = h + i * stride;
    f[held++] = factors[i];
    if (held < rows.size()) continue;
    // Four rows at once: each sum is read and written once for four products.
    for (int64_t k = 0; k < n; ++k) {
      to[k] -= (f[0] * rows[0][k] + f[1] * rows[1][k]) + (f[2] * rows[2][k] + f[3] * rows[3][k]);
    }
    held = 0;
  }
  for (size_t i = 0; i < held; ++i) {
    for (int64_t k = 0; k < n; ++k) to[k] -= f[i] * rows[i][k];
  }
}

QAT_CLONES double dot(const float* a, const float* b, int64_t n) {
  return dot_of(a, b, n);
}

QAT_CLONES double bilinear(const float* a, const float* h, int64_t stride, const float* b, int64_t n) {
  double sum = 0.0;
  for (int64_t first = 0; first < n; first += kColumns) {
    const int64_t count = std::min(kColumns, n - first);
    float columns[kColumns] = {};
    for (int64_t i = 0; i < n; ++i) {
      const float* row = h + i * stride + first;
      const float factor = a[i];
      if (count == kColumns) {
        for (int64_t k = 0; k < kColumns; ++k) columns[k] += factor * row[k];
      } else {
        for (int64_t k = 0; k < count; ++k) columns[k] += factor * row[k];
      }
    }
    sum += dot_of(columns, b + first, count);
  }
  return sum;
}

}  // namespace qat::ptq
