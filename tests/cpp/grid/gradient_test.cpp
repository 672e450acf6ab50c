// The gradients of fake-quantization against closed formulas in double, which are written here from the
// grids' public functions; the vectorised path against the scalar one.

#include <algorithm>
#include <cstring>
#include <numbers>

#include "catch.hpp"
#include "held_scales.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::EstimatorKind;
using qat::test::Row;

namespace {

struct Gradients {
  std::vector<double> w;
  std::vector<double> s;
  std::vector<double> slack;  ///< of s: the sum of the magnitudes of its terms
};

constexpr double kE2M1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

/// The weights that share one pair of scale and offset: w_hat = level * scale + offset, level = code - zero.
struct Line {
  size_t first, count;
  double scale;  ///< with which codes are picked
  double offset;
  double zero;
};

bool is_kquant(std::string_view name) {
  return name.ends_with("_k");
}
bool has_sub_minima(std::string_view name) {
  return name == "q2_k" || name == "q4_k" || name == "q5_k";
}
bool is_e2m1(std::string_view name) {
  return name.ends_with("fp4");
}

/// Block b of a row, or sub-block b of a row of K-quants.
std::vector<Line> lines_of(const grid::Grid& g, std::string_view name, int64_t n, const Row& s,
                           const Row& held) {
  std::vector<Line> lines;
  const auto params = static_cast<size_t>(g.params());
  const auto block = static_cast<size_t>(g.block(n));
  for (size_t b = 0; b < s.size() / params; ++b) {
    const float* of = s.data() + b * params;
    const float* stored = held.data() + b * params;
    if (is_kquant(name)) {
      const size_t subs = has_sub_minima(name) ? (params - 2) / 2 : params - 1;
      const size_t first = params - (has_sub_minima(name) ? 2 : 1) * subs;
      for (size_t sub = 0; sub < subs; ++sub) {
        const double minimum =
            has_sub_minima(name) ? static_cast<double>(stored[1]) * stored[first + subs + sub] : 0;
        lines.push_back({b * block + sub * (block / subs), block / subs,
                         static_cast<double>(stored[0]) * stored[first + sub], -minimum, 0});
      }
      continue;
    }
    const bool ggml = name[0] == 'q' || name[0] == 't' || name[0] == 'm' && name[1] == 'l';
    const bool offset = name.starts_with("q4_1") || name.starts_with("q5_1") || name.starts_with("mlx");
    const bool zero = name.find("_asym") != std::string_view::npos;
    lines.push_back({b * block, block, ggml ? of[0] : stored[0], offset ? of[1] : 0.0,
                     zero                       ? static_cast<double>(stored[1])
                     : name.starts_with("mlx8") ? -128.0
                                                : 0.0});
  }
  return lines;
}

/// A weight by the formulas of grid.hpp.
struct Weight {
  double position, level, spacing, slope;
  bool inside;
};

Weight weight_of(std::string_view name, const Line& line, double w, int code, bool inside) {
  Weight found{line.scale == 0 ? 0 : (w - line.offset) / line.scale, code - line.zero, 1, 0, inside};
  if (line.scale == 0) found.level = 0;
  if (is_e2m1(name)) {
    found.level = (code >= 8 ? -1 : 1) * kE2M1[code % 8];
    const double size = std::abs(found.position);
    found.spacing = size < 2 ? 0.5 : size < 4 ? 1 : 2;
  }
  if (name == "q1_0") {
    found.level = code != 0 ? 1 : -1;
    found.spacing = 2;
  }
  found.slope = inside && name != "q1_0" ? found.level - found.position : found.level;
  return found;
}

/// StableQAT as the paper writes it, with v + r(v), in units of the distance between levels. q1_0's levels
/// are odd multiples of half of it.
double stable_factor(std::string_view name, const Weight& at) {
  // A weight just outside the range that counts as inside: the border's own factor.
  if (std::abs(at.level - at.position) > 0.5 * at.spacing) return 1;
  const double places = (at.position + at.level) / at.spacing + (name == "q1_0" ? 1 : 0);
  const double s = std::sqrt(2.0) * std::numbers::pi * 0.21 * std::cos(std::numbers::pi * places);
  return (1 - s) / (1 + s);
}

double trust_threshold(const grid::Info& info, const Row& w) {
  double squares = 0;
  for (const float value : w) squares += static_cast<double>(value) * value;
  const int levels = info.code_max - info.code_min + 1;
  const double range = levels == 2     ? 0.7979
                       : levels == 3   ? 1.2240
                       : levels == 4   ? 1.4935
                       : levels == 8   ? 2.0511
                       : levels == 16  ? 2.5139
                       : levels == 32  ? 2.9161
                       : levels == 64  ? 3.2766
                       : levels == 128 ? 3.6010
                                       : 3.8849;
  return range * std::sqrt(squares / static_cast<double>(w.size())) / (levels - 1);
}

/// The gradients by their definitions; NaN where the mask of a weight is too close to call.
Gradients expected(std::string_view name, const Row& w, const Row& s, const Row& g, EstimatorKind kind) {
  const grid::Grid& one = grid::reference(name);
  const auto n = static_cast<int64_t>(w.size());
  Row held(s.size());
  Row w_hat(w.size());
  std::vector<int8_t> codes(w.size());
  std::vector<uint8_t> mask(w.size());
  REQUIRE(one.store(s.data(), n, held.data()) == grid::Status::kOk);
  one.encode(w.data(), n, s.data(), codes.data());
  one.decode(codes.data(), n, held.data(), w_hat.data());
  one.in_range(w.data(), n, s.data(), mask.data());
  const double trust = trust_threshold(one.info(), w);
  Gradients found{std::vector<double>(w.size()), std::vector<double>(s.size()),
                  std::vector<double>(s.size())};
  const std::vector<Line> lines = lines_of(one, name, n, s, held);
  const size_t per_block = lines.size() * static_cast<size_t>(one.params()) / s.size();
  for (size_t b = 0; b < lines.size(); ++b) {
    double of_scale = 0, of_offset = 0, size = 0;
    for (size_t i = lines[b].first; i < lines[b].first + lines[b].count; ++i) {
      const Weight at = weight_of(name, lines[b], w[i], codes[i], mask[i] != 0);
      of_scale += g[i] * at.slope;
      of_offset += at.inside ? 0 : g[i];
      size += std::abs(g[i]) * (std::abs(at.level) + std::abs(at.position) + 1);
      const double error = std::abs(static_cast<double>(w_hat[i]) - w[i]);
      double factor = 1;
      if (kind == EstimatorKind::kClippedSte) factor = at.inside ? 1 : 0;
      if (kind == EstimatorKind::kTrustMask) factor = error <= trust ? 1 : 0;
      // The threshold is a float32 number.
      if (kind == EstimatorKind::kTrustMask && std::abs(error - trust) < 1e-6 * trust) factor = NAN;
      if (kind == EstimatorKind::kStableQat) {
        factor = at.inside ? stable_factor(name, at) : 0;
      }
      found.w[i] = g[i] * factor;
    }
    const size_t p = b / per_block * static_cast<size_t>(one.params());
    if (!is_kquant(name)) {
      found.s[p] = of_scale;
      found.slack[p] = size;
      if (one.params() == 1) continue;
      const double slope = name.find("_asym") != std::string_view::npos ? -static_cast<double>(held[p]) : 1.0;
      found.s[p + 1] = slope * of_offset;
      found.slack[p + 1] = size * std::abs(slope);
      continue;
    }
    const size_t sub = b % per_block + (has_sub_minima(name) ? 2 : 1);
    const auto add = [&](size_t to, double by, double factor) {
      found.s[p + to] += by * factor;
      found.slack[p + to] += size * std::abs(factor);
    };
    add(0, of_scale, held[p + sub]);
    add(sub, of_scale, held[p]);
    if (!has_sub_minima(name)) continue;
    add(1, -of_offset, held[p + sub + per_block]);
    add(sub + per_block, -of_offset, held[p + 1]);
  }
  return found;
}

Gradients computed(const grid::Grid& one, const Row& w, const Row& s, const Row& g, EstimatorKind kind) {
  Row grad_w(w.size());
  Row grad_s(s.size());
  const auto n = static_cast<int64_t>(w.size());
  REQUIRE(one.backward(w.data(), n, s.data(), g.data(), kind, grad_w.data(), grad_s.data()) ==
          grid::Status::kOk);
  return {{grad_w.begin(), grad_w.end()}, {grad_s.begin(), grad_s.end()}, {}};
}

}  // namespace

TEST_CASE("backward follows the closed formulas") {
  std::mt19937 generator(21);
  std::uniform_real_distribution<float> factor(0.3F, 1.2F);
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& one = grid::find(name);
    for (const int64_t n : qat::test::few_lengths(one)) {
      for (const int sign : {1, -1}) {
        const Row w = qat::test::random_row(generator, n, name == "nvfp4" ? 3 : -2);
        const Row g = qat::test::random_row(generator, n, 0);
        Row s(static_cast<size_t>(one.blocks(n) * one.params()));
        REQUIRE(one.choose(w.data(), n, s.data()) == grid::Status::kOk);
        // Smaller scales clip; of either sign but where they are none in the file.
        for (float& value : s) value *= factor(generator) * static_cast<float>(is_e2m1(name) ? 1 : sign);
        for (const EstimatorKind kind : qat::test::kKinds) {
          const Gradients exact = expected(name, w, s, g, kind);
          const Gradients got = computed(one, w, s, g, kind);
          for (size_t i = 0; i < w.size(); ++i) {
            INFO(name << ", n = " << n << ", " << to_string(kind) << ", weight " << i << ", w " << w[i]);
            // A position up to 256 is known to 2^-15 in float32; the factor's slope in e is at most 10.
            if (!std::isnan(exact.w[i])) REQUIRE(std::abs(got.w[i] - exact.w[i]) <= 4e-4 * std::abs(g[i]));
            if (kind != EstimatorKind::kStableQat && !std::isnan(exact.w[i])) REQUIRE(got.w[i] == exact.w[i]);
          }
          for (size_t p = 0; p < s.size(); ++p) {
            INFO(name << ", n = " << n << ", " << to_string(kind) << ", scale " << p);
            // Float32 rounds each term a few times: 4 * 2^-24 of it.
            REQUIRE(std::abs(got.s[p] - exact.s[p]) <= 2.4e-7 * exact.slack[p]);
          }
        }
      }
    }
  }
}

TEST_CASE("backward: both paths agree bit for bit, whichever outputs are wanted, in place too") {
  std::mt19937 generator(22);
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& fast = grid::find(name);
    const grid::Grid& reference = grid::reference(name);
    for (const int64_t n : qat::test::few_lengths(fast)) {
      const Row w = qat::test::random_row(generator, n, static_cast<int>(generator() % 40) - 20);
      const Row g = qat::test::random_row(generator, n, 0);
      for (const Row& s : qat::test::held_scales(generator, fast, w)) {
        for (const EstimatorKind kind : qat::test::kKinds) {
          Row grad_w(w.size()), fast_w(w.size()), grad_s(s.size()), fast_s(s.size());
          const grid::Status status =
              reference.backward(w.data(), n, s.data(), g.data(), kind, grad_w.data(), grad_s.data());
          INFO(name << ", n = " << n << ", " << to_string(kind) << ", s[0] = " << s[0]);
          REQUIRE(fast.backward(w.data(), n, s.data(), g.data(), kind, fast_w.data(), fast_s.data()) ==
                  status);
          if (status != grid::Status::kOk) continue;
          REQUIRE(std::memcmp(grad_w.data(), fast_w.data(), w.size() * 4) == 0);
          REQUIRE(std::memcmp(grad_s.data(), fast_s.data(), s.size() * 4) == 0);
          for (const Row* grads : {&grad_w, &grad_s}) {
            REQUIRE(std::ranges::all_of(*grads, [](float value) { return std::isfinite(value); }));
          }
          Row in_place = g;
          static_cast<void>(
              fast.backward(w.data(), n, s.data(), in_place.data(), kind, in_place.data(), nullptr));
          REQUIRE(std::memcmp(in_place.data(), fast_w.data(), w.size() * 4) == 0);
          Row alone(s.size());
          static_cast<void>(fast.backward(w.data(), n, s.data(), g.data(), kind, nullptr, alone.data()));
          REQUIRE(std::memcmp(alone.data(), fast_s.data(), s.size() * 4) == 0);
        }
      }
    }
  }
}

TEST_CASE("a scale of 0 has no gradient") {
  for (const std::string_view name : qat::test::coded_grids()) {
    const grid::Grid& one = grid::find(name);
    const int64_t n = one.block(64);
    const Row w = qat::test::filled(n, 0.5F);
    const Row s(static_cast<size_t>(one.params()), 0.0F);
    const Gradients got = computed(one, w, s, w, EstimatorKind::kClippedSte);
    INFO(name);
    REQUIRE(got.s[0] == (name == "q1_0" ? 0.5 * static_cast<double>(n) : 0.0));
    REQUIRE(got.w[0] == 0.5);
  }
}
