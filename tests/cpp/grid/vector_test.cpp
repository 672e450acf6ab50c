// The vectorised rows equal the scalar codecs bit for bit, errors included. On a CPU without AVX2 and F16C
// `find` and `reference` run the same code and the comparison is trivially true.

#include <cstring>

#include "catch.hpp"
#include "qat/grid/grid.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::Row;

namespace {

bool same_bits(const auto& a, const auto& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
}

/// Empty when both paths find the same scales, else what differs.
std::string scale_difference(const grid::Grid& fast, const grid::Grid& reference, const Row& w,
                             qat::ScaleRule rule) {
  const auto n = static_cast<int64_t>(w.size());
  Row expected(static_cast<size_t>(fast.blocks(n) * fast.params()));
  Row got(expected.size());
  const grid::Status status = reference.scales(rule, w.data(), n, expected.data());
  if (fast.scales(rule, w.data(), n, got.data()) != status) return "status of scales";
  return status != grid::Status::kOk || same_bits(got, expected) ? "" : "scales";
}

/// Empty when both paths agree on this row, else what differs.
std::string difference(const grid::Grid& fast, const grid::Grid& reference, const Row& w,
                       qat::ScaleRule rule) {
  const auto n = static_cast<int64_t>(w.size());
  Row expected(w.size());
  Row got(w.size());
  const grid::Status status = reference.fake_quantize(w.data(), n, expected.data(), rule);
  if (fast.fake_quantize(w.data(), n, got.data(), rule) != status) return "status";
  if (status == grid::Status::kOk && !same_bits(got, expected)) return "float32";
  Row in_place = w;
  if (fast.fake_quantize(in_place.data(), n, in_place.data(), rule) != status) return "status in place";
  if (status == grid::Status::kOk && !same_bits(in_place, expected)) return "in place";

  std::vector<uint16_t> expected_bf16(w.size());
  std::vector<uint16_t> got_bf16(w.size());
  if (reference.fake_quantize_bf16(w.data(), n, expected_bf16.data(), rule) != status)
    return "bf16 reference status";
  if (fast.fake_quantize_bf16(w.data(), n, got_bf16.data(), rule) != status) return "bf16 status";
  if (status == grid::Status::kOk && !same_bits(got_bf16, expected_bf16)) return "bfloat16";
  return scale_difference(fast, reference, w, rule);
}

/// The same, with both scale rules.
std::string difference(const grid::Grid& fast, const grid::Grid& reference, const Row& w) {
  const std::string chosen = difference(fast, reference, w, qat::ScaleRule::kReference);
  if (!chosen.empty()) return chosen;
  const std::string searched = difference(fast, reference, w, qat::ScaleRule::kSearch);
  return searched.empty() ? "" : searched + " with searched scales";
}

std::vector<int64_t> lengths(const grid::Grid& g) {
  const int64_t block = g.info().block;
  if (block > 0) return {block, 2 * block, 3 * block, 576 / block * block};
  std::vector<int64_t> all;
  for (int64_t n = 1; n <= 70; ++n) all.push_back(n);
  all.push_back(577);
  return all;
}

}  // namespace

TEST_CASE("random rows over all magnitudes") {
  std::mt19937 generator(1);
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& fast = grid::find(name);
    for (const int64_t n : lengths(fast)) {
      for (int exponent = -152; exponent <= 128; exponent += fast.info().block == 32 ? 1 : 7) {
        const Row row = qat::test::random_row(generator, n, exponent);
        INFO(name << ", n = " << n << ", exponent = " << exponent);
        REQUIRE(difference(fast, grid::reference(name), row) == "");
      }
    }
  }
}

TEST_CASE("adversarial rows") {
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& fast = grid::find(name);
    for (const int64_t n : lengths(fast)) {
      const std::vector<Row> rows = qat::test::adversarial_rows(n);
      for (size_t i = 0; i < rows.size(); ++i) {
        INFO(name << ", n = " << n << ", row " << i);
        REQUIRE(difference(fast, grid::reference(name), rows[i]) == "");
      }
    }
  }
}

TEST_CASE("a non-finite weight anywhere is found, and outranks an overflow") {
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& fast = grid::find(name);
    const int64_t n = fast.info().block > 0 ? 2 * fast.info().block : 97;
    for (size_t at = 0; at < static_cast<size_t>(n); ++at) {
      for (const float bad : {qat::test::kInf, -qat::test::kInf, qat::test::kNan, -qat::test::kNan}) {
        Row row = qat::test::filled(n, 1.0F);
        row[static_cast<size_t>(n) - 1 - at] = qat::test::kHuge;
        row[at] = bad;
        Row out(row.size());
        INFO(name << ", position " << at);
        REQUIRE(fast.fake_quantize(row.data(), n, out.data()) == grid::Status::kNotFinite);
        REQUIRE(difference(fast, grid::reference(name), row) == "");
      }
    }
  }
}
