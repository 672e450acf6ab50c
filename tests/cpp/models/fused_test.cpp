#include "models/fused.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>

#include <functional>
#include <vector>

#include "catch.hpp"

namespace models = qat::models;

namespace {

using Inputs = std::vector<at::Tensor>;
using Step = std::function<at::Tensor(const Inputs&)>;

/// Result and gradients of `step` on copies of the inputs in that dtype, all as float64.
Inputs run(const Step& step, const Inputs& inputs, at::ScalarType dtype) {
  Inputs leaves;
  for (const at::Tensor& input : inputs) leaves.push_back(input.to(dtype, false, true).requires_grad_());
  const at::Tensor y = step(leaves);
  y.backward(at::ones_like(y) * at::arange(1, y.size(-1) + 1).to(dtype) * 0.25);
  Inputs results = {y.detach().to(at::kDouble)};
  for (const at::Tensor& leaf : leaves) results.push_back(leaf.grad().to(at::kDouble));
  return results;
}

/// The CPU kernels against the same formula as tensor operations in float64, where autograd derives the
/// gradients.
void compare(const Step& step, const Inputs& inputs, at::ScalarType dtype, double tolerance) {
  Inputs stored;
  for (const at::Tensor& input : inputs) stored.push_back(input.to(dtype));
  const Inputs got = run(step, stored, dtype), expected = run(step, stored, at::kDouble);
  REQUIRE(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    REQUIRE(got[i].sizes() == expected[i].sizes());
    const double error = (got[i] - expected[i]).abs().max().item<double>();
    REQUIRE(error <= tolerance * expected[i].abs().max().item<double>());
  }
}

at::Tensor random(at::IntArrayRef shape, uint64_t seed) {
  return at::randn(shape, at::make_generator<at::CPUGeneratorImpl>(seed), at::kDouble);
}

// float32 sums of up to 2,000 terms; bfloat16 rounds once at the end, to 2^-9 of the value.
constexpr double kFloat = 2e-6;
constexpr double kHalf = 4e-3;

}  // namespace

TEST_CASE("rms_norm: values and gradients") {
  // 70 rows make more than one group of the gain's partial sums, the last one incomplete.
  const Step step = [](const Inputs& in) {
    return models::rms_norm(in[0], in[1], 1e-5, in[0].scalar_type());
  };
  compare(step, {random({2, 35, 40}, 1), random({40}, 2)}, at::kFloat, kFloat);
}

TEST_CASE("rms_norm: float32 in, bfloat16 out") {
  const at::Tensor x = random({3, 5, 40}, 1).to(at::kFloat), w = random({40}, 2).to(at::kFloat);
  const at::Tensor y = models::rms_norm(x, w, 1e-5, at::kBFloat16);
  REQUIRE(y.scalar_type() == at::kBFloat16);
  REQUIRE(at::equal(y, models::rms_norm(x, w, 1e-5, at::kFloat).to(at::kBFloat16)));
}

TEST_CASE("rotate: values and gradients, also of a transposed gradient") {
  const at::Tensor angles = random({7, 4}, 3).to(at::kFloat);
  const at::Tensor cos = angles.cos(), sin = angles.sin();
  const Step plain = [&](const Inputs& in) { return models::rotate(in[0], cos, sin); };
  const Step transposed = [&](const Inputs& in) { return models::rotate(in[0], cos, sin).transpose(1, 2); };
  for (const Step& step : {plain, transposed}) {
    compare(step, {random({2, 7, 3, 8}, 4)}, at::kFloat, kFloat);
    compare(step, {random({2, 7, 3, 8}, 4)}, at::kBFloat16, kHalf);
  }
}

TEST_CASE("gated products: values and gradients of both activations") {
  for (const auto activation : {models::Activation::kSilu, models::Activation::kGeluTanh}) {
    const Step step = [&](const Inputs& in) { return models::gated(in[0], in[1], activation); };
    compare(step, {random({2, 9, 50}, 5) * 3, random({2, 9, 50}, 6)}, at::kFloat, kFloat);
    compare(step, {random({2, 9, 50}, 5) * 3, random({2, 9, 50}, 6)}, at::kBFloat16, kHalf);
  }
}
