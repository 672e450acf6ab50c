// A tensor of a checkpoint on another grid.

#include "qat/checkpoint/convert.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <string>

#include "qat/core/error.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using qat::convert_tensor;
using qat::QuantizedTensor;

/// int4 in groups of 32: every code, and the scales of each group.
QuantizedTensor groups(int64_t rows, float scale) {
  const at::Tensor codes = at::arange(rows * 64).remainder(16).sub(8).to(at::kChar).view({rows, 64});
  return {{"int4_g32"}, {rows, 64}, codes, at::full({rows, 2, 1}, scale)};
}

}  // namespace

TEST_CASE("a converted tensor has the same numbers in its own shape") {
  QuantizedTensor tensor = groups(6, 0.25F);
  tensor.shape = {6, 4, 16};
  const auto result = convert_tensor("conv.weight", tensor, "q4_0");
  REQUIRE(result);
  REQUIRE(result->scheme.weight == "q4_0");
  REQUIRE(result->shape == tensor.shape);
  REQUIRE(at::equal(result->codes, tensor.codes));
  REQUIRE(at::equal(qat::dequantize_tensor("w", *result), qat::dequantize_tensor("w", tensor)));
}

TEST_CASE("the reason names the first row that does not fit, and its block") {
  QuantizedTensor tensor = groups(3000, 0.25F);
  for (const int64_t row : {2900, 1234, 2000}) tensor.scales[row][1][0] = 0.1F;
  std::string why;
  REQUIRE_FALSE(convert_tensor("w", tensor, "q4_0", &why));
  REQUIRE(why == "row 1234, block 1: scales of q4_0 cannot hold 0.100000001 exactly");
  REQUIRE_FALSE(convert_tensor("w", tensor, "int4_g128", &why));
  REQUIRE(why == "rows of 64 weights are not whole blocks of 128 (int4_g128)");
}

TEST_CASE("bad arguments are named") {
  const QuantizedTensor tensor = groups(2, 0.25F);
  REQUIRE_THROWS_WITH(convert_tensor("w", tensor, "f16"),
                      "convert_tensor: w: expected a grid with codes, got \"f16\"");
  REQUIRE_THROWS_AS(convert_tensor("w", tensor, "q9"), qat::ArgumentError);
  QuantizedTensor broken = tensor;
  broken.codes = tensor.codes.clone();
  broken.codes[1][3] = 8;
  REQUIRE_THROWS_WITH(convert_tensor("w", broken, "q4_0"),
                      "convert_tensor: w: expected codes from -8 to 7 (int4_g32), got 8");
  broken = tensor;
  broken.scales = at::zeros({2, 1, 1});
  REQUIRE_THROWS_AS(convert_tensor("w", broken, "q4_0"), qat::ArgumentError);
}
