// Fake-quantization with scales that the caller holds: one pass equals store, encode and decode bit for bit,
// for scales that no rule would choose too.

#include <cstring>

#include "catch.hpp"
#include "held_scales.hpp"
#include "qat/grid/bf16.hpp"
#include "qat/grid/grid.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::kInf;
using qat::test::kNan;
using qat::test::Row;

namespace {

bool same_bits(const auto& a, const auto& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
}

/// Empty when both paths equal the three functions, else what differs.
std::string difference(std::string_view name, const Row& w, const Row& s) {
  const grid::Grid& reference = grid::reference(name);
  const auto n = static_cast<int64_t>(w.size());
  Row stored(s.size());
  const grid::Status status = reference.store(s.data(), n, stored.data());
  Row expected(w.size());
  std::vector<uint16_t> expected_bf16(w.size());
  if (status == grid::Status::kOk) {
    std::vector<int8_t> codes(w.size());
    reference.encode(w.data(), n, s.data(), codes.data());
    reference.decode(codes.data(), n, stored.data(), expected.data());
    for (size_t i = 0; i < w.size(); ++i) expected_bf16[i] = grid::bf16_bits(expected[i]);
  }
  for (const grid::Grid* g : {&grid::find(name), &reference}) {
    Row got(w.size());
    if (g->fake_quantize_with(w.data(), n, s.data(), got.data()) != status) return "status";
    if (status == grid::Status::kOk && !same_bits(got, expected)) return "float32";
    Row in_place = w;
    if (g->fake_quantize_with(in_place.data(), n, s.data(), in_place.data()) != status) return "in place";
    if (status == grid::Status::kOk && !same_bits(in_place, expected)) return "in place";
    std::vector<uint16_t> half(w.size());
    if (g->fake_quantize_bf16_with(w.data(), n, s.data(), half.data()) != status) return "bf16 status";
    if (status == grid::Status::kOk && !same_bits(half, expected_bf16)) return "bfloat16";
  }
  return "";
}

}  // namespace

TEST_CASE("held scales: one pass equals store, encode and decode") {
  std::mt19937 generator(11);
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& g = grid::find(name);
    for (const int64_t n : qat::test::few_lengths(g)) {
      for (int exponent = -152; exponent <= 124; exponent += 23) {
        const Row w = qat::test::random_row(generator, n, exponent);
        for (const Row& s : qat::test::held_scales(generator, g, w)) {
          INFO(name << ", n = " << n << ", exponent = " << exponent << ", s[0] = " << s[0]);
          REQUIRE(difference(name, w, s) == "");
        }
      }
    }
  }
}

TEST_CASE("held scales: adversarial rows") {
  std::mt19937 generator(12);
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = qat::test::few_lengths(g).back();
    for (const Row& w : qat::test::adversarial_rows(n)) {
      if (!std::isfinite(w.back()) || !std::isfinite(w.front())) continue;
      for (const Row& s : qat::test::held_scales(generator, g, w)) {
        INFO(name << ", w ends in " << w.back() << ", s[0] = " << s[0]);
        REQUIRE(difference(name, w, s) == "");
      }
    }
  }
}

TEST_CASE("the rule's own scales give what fake_quantize gives") {
  std::mt19937 generator(13);
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = 2 * g.block(64);
    for (int i = 0; i < 20; ++i) {
      const Row w = qat::test::random_row(generator, n, i - 12);
      for (const qat::ScaleRule rule : {qat::ScaleRule::kReference, qat::ScaleRule::kSearch}) {
        Row s(static_cast<size_t>(g.blocks(n) * g.params()));
        Row expected(w.size());
        Row got(w.size());
        REQUIRE(g.scales(rule, w.data(), n, s.data()) == grid::Status::kOk);
        REQUIRE(g.fake_quantize(w.data(), n, expected.data(), rule) == grid::Status::kOk);
        REQUIRE(g.fake_quantize_with(w.data(), n, s.data(), got.data()) == grid::Status::kOk);
        INFO(name << ", row " << i);
        REQUIRE(same_bits(got, expected));
      }
    }
  }
}

TEST_CASE("a weight or a held scale that is not finite is found") {
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = 2 * g.block(33);
    const Row w = qat::test::filled(n, 1.0F);
    Row s(static_cast<size_t>(g.blocks(n) * g.params()));
    REQUIRE(g.choose(w.data(), n, s.data()) == grid::Status::kOk);
    Row out(w.size());
    std::vector<uint16_t> half(w.size());
    Row grad(w.size());
    const auto check = [&](const Row& weights, const Row& scales, grid::Status status) {
      for (const grid::Grid* one : {&g, &grid::reference(name)}) {
        INFO(name);
        REQUIRE(one->fake_quantize_with(weights.data(), n, scales.data(), out.data()) == status);
        REQUIRE(one->fake_quantize_bf16_with(weights.data(), n, scales.data(), half.data()) == status);
        REQUIRE(one->backward(weights.data(), n, scales.data(), w.data(), qat::EstimatorKind::kClippedSte,
                              grad.data(), nullptr) == status);
      }
    };
    for (size_t p = 0; p < s.size(); p += 5) {
      Row bad = s;
      bad[p] = kNan;
      check(w, bad, grid::Status::kNotFinite);
      bad[s.size() - 1 - p] = kNan;
      bad[p] = kInf;  // a NaN after an overflow still outranks it
      if (p != s.size() - 1 - p) check(w, bad, grid::Status::kNotFinite);
    }
    for (const float value : {kNan, kInf, -kInf}) {
      Row bad = w;
      bad.back() = value;
      check(bad, s, grid::Status::kNotFinite);
    }
    Row bad = s;
    bad[0] = kInf;
    check(w, bad, grid::Status::kOverflow);
  }
}

TEST_CASE("float grids round as they do, and let every gradient pass") {
  std::mt19937 generator(14);
  const Row w = qat::test::random_row(generator, 40, 0);
  const Row g = qat::test::random_row(generator, 40, 0);
  for (const std::string_view name : {"f32", "f16", "bf16"}) {
    const grid::Grid& one = grid::find(name);
    Row expected(w.size());
    Row got(w.size());
    REQUIRE(one.fake_quantize(w.data(), 40, expected.data()) == grid::Status::kOk);
    REQUIRE(one.fake_quantize_with(w.data(), 40, nullptr, got.data()) == grid::Status::kOk);
    REQUIRE(same_bits(got, expected));
    for (const qat::EstimatorKind kind : qat::test::kKinds) {
      REQUIRE(one.backward(w.data(), 40, nullptr, g.data(), kind, got.data(), nullptr) == grid::Status::kOk);
      REQUIRE(same_bits(got, g));
    }
    REQUIRE(one.rule_has_gradient());
    REQUIRE(one.choose_backward(w.data(), 40, nullptr, got.data()) == grid::Status::kOk);
    REQUIRE(same_bits(got, g));
  }
}
