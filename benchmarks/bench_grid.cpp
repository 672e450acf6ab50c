// How fast the grids fake-quantize, beside memcpy: bench_grid [rows] [columns] [repeats] > grid.json
// One thread. `read_write_gbs` counts the bytes read and written; the figure is that of the fastest repeat.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "qat/grid/grid.hpp"

namespace {

struct Matrix {
  int64_t rows;
  int64_t columns;
  int repeats;
};

template <class Body>
double fastest_seconds(int repeats, Body body) {
  double best = 1e30;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = took.count() < best ? took.count() : best;
  }
  return best;
}

void print(bool first, const std::string& what, double bytes, double seconds) {
  std::printf("%s\n  {\"what\": \"%s\", \"seconds\": %.3e, \"read_write_gbs\": %.2f}", first ? "" : ",",
              what.c_str(), seconds, bytes / seconds * 1e-9);
}

/// What a training step does with held scales: both outputs, and the gradients by each estimator.
void bench_training(const Matrix& m, const qat::grid::Grid& grid, const std::string& label, const float* w,
                    float* out, uint16_t* half) {
  if (grid.info().is_float) return;
  const int64_t scales = grid.blocks(m.columns) * grid.params();
  std::vector<float> s(static_cast<size_t>(m.rows * scales));
  std::vector<float> grad_s(s.size());
  const auto seconds = [&](auto one) {
    return fastest_seconds(m.repeats, [&] {
      for (int64_t r = 0; r < m.rows; ++r) {
        if (one(r * m.columns, r * scales) != qat::grid::Status::kOk) std::abort();
      }
    });
  };
  seconds([&](int64_t at, int64_t of) { return grid.choose(w + at, m.columns, s.data() + of); });
  const auto count = static_cast<double>(m.rows * m.columns);
  print(false, label + " held", count * 8, seconds([&](int64_t at, int64_t of) {
          return grid.fake_quantize_with(w + at, m.columns, s.data() + of, out + at);
        }));
  print(false, label + " held bf16", count * 6, seconds([&](int64_t at, int64_t of) {
          return grid.fake_quantize_bf16_with(w + at, m.columns, s.data() + of, half + at);
        }));
  using enum qat::EstimatorKind;
  for (const qat::EstimatorKind kind : {kSte, kClippedSte, kTrustMask, kStableQat}) {
    print(false, label + " backward " + std::string(qat::to_string(kind)), count * 12,
          seconds([&](int64_t at, int64_t of) {
            return grid.backward(w + at, m.columns, s.data() + of, w + at, kind, out + at,
                                 grad_s.data() + of);
          }));
  }
}

/// Both outputs of one grid over the matrix w.
void bench_grid(const Matrix& m, const qat::grid::Grid& grid, const std::string& label, const float* w,
                float* out, uint16_t* half) {
  const auto over_rows = [&m](auto one) {
    return [&m, one] {
      for (int64_t at = 0; at < m.rows * m.columns; at += m.columns) {
        if (one(at) != qat::grid::Status::kOk) std::abort();
      }
    };
  };
  const auto count = static_cast<double>(m.rows * m.columns);
  const auto to_f32 = [&](int64_t at) { return grid.fake_quantize(w + at, m.columns, out + at); };
  const auto to_bf16 = [&](int64_t at) { return grid.fake_quantize_bf16(w + at, m.columns, half + at); };
  print(false, label, count * 8, fastest_seconds(m.repeats, over_rows(to_f32)));
  print(false, label + " bf16", count * 6, fastest_seconds(m.repeats, over_rows(to_bf16)));
}

void bench(const Matrix& m) {
  std::vector<float> w(static_cast<size_t>(m.rows * m.columns));
  std::vector<float> out(w.size());
  std::vector<uint16_t> half(w.size());
  std::mt19937 generator(0);
  std::normal_distribution<float> normal(0.0F, 0.05F);
  for (float& value : w) value = normal(generator);

  const size_t bytes = w.size() * sizeof(float);
  print(true, "memcpy", static_cast<double>(2 * bytes),
        fastest_seconds(m.repeats, [&] { std::memcpy(out.data(), w.data(), bytes); }));
  for (const std::string_view name : qat::grid::names()) {
    const std::string label(name);
    bench_grid(m, qat::grid::find(name), label, w.data(), out.data(), half.data());
    bench_grid(m, qat::grid::reference(name), label + " scalar", w.data(), out.data(), half.data());
    bench_training(m, qat::grid::find(name), label, w.data(), out.data(), half.data());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  const Matrix matrix{argument(1, 1024), argument(2, 1536), static_cast<int>(argument(3, 50))};
  if (matrix.rows <= 0 || matrix.columns <= 0 || matrix.columns % 256 != 0 || matrix.repeats <= 0) {
    std::fprintf(stderr, "bench_grid: expected positive [rows] [columns, a multiple of 256] [repeats]\n");
    return 2;
  }
  std::printf("{\"rows\": %lld, \"columns\": %lld, \"repeats\": %d, \"results\": [",
              static_cast<long long>(matrix.rows), static_cast<long long>(matrix.columns), matrix.repeats);
  bench(matrix);
  std::printf("\n]}\n");
  return 0;
}
