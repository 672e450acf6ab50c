#include "qat/quantizer/activation.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/ops/activation.hpp"
#include "qat/quantizer/quantizer.hpp"

namespace {

using qat::ActivationQuantizer;
using qat::ActivationRule;
using qat::ActivationScales;

ActivationQuantizer make(ActivationScales rule, const char* format = "int8_tensor_static") {
  return ActivationQuantizer("up.input_activation_scale", format, rule, at::kCPU);
}

float scale_of(const ActivationQuantizer& rounding) {
  return rounding.scale().item<float>();
}

/// Rounds the input again in backward, a hundred times as large, as activation checkpointing might.
struct Recomputed : torch::autograd::Function<Recomputed> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            int64_t rounding) {
    context->saved_data["rounding"] = rounding;
    context->save_for_backward({x});
    return x * 2;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    auto& rounding = *reinterpret_cast<ActivationQuantizer*>(context->saved_data["rounding"].toInt());
    const at::AutoGradMode as_in_checkpointing(true);
    rounding(context->get_saved_variables()[0] * 100);
    return {grads[0] * 2, {}};
  }
};

}  // namespace

TEST_CASE("a static scale grows over the first batches that record gradients, then stays") {
  ActivationQuantizer rounding = make({ActivationRule::kObserved, 3});
  {
    const at::NoGradGuard no_grad;
    const at::Tensor x = at::full({2, 3}, 9.0);
    REQUIRE(rounding(x).equal(x));  // not calibrated yet
    REQUIRE(scale_of(rounding) == 0.0F);
  }
  rounding(at::tensor({1.0F, -2.5F}));
  rounding(at::tensor({2.0F}).to(at::kBFloat16));
  REQUIRE(scale_of(rounding) == static_cast<float>(2.5 / 127));
  rounding(at::full({0, 4}, 1.0));
  rounding(at::full({1}, 100.0));
  REQUIRE(scale_of(rounding) == static_cast<float>(2.5 / 127));
  REQUIRE(rounding.batches().item<int64_t>() == 3);
  const at::Tensor x = at::tensor({0.013F, -0.4F, 77.0F});
  REQUIRE(rounding(x).equal(
      qat::ops::fake_quantize_activation(x, "int8_tensor_static", at::scalar_tensor(2.5 / 127, at::kFloat))));
}

TEST_CASE("backward finds the scale of its own pass, also when another has widened it") {
  ActivationQuantizer rounding = make({ActivationRule::kLearned, 4});
  const at::Tensor x = at::tensor({0.3F, 1.0F}).requires_grad_();
  const at::Tensor one = rounding(x);
  const at::Tensor two = rounding(x * 100);
  (one.sum() + two.sum()).backward();
  REQUIRE(x.grad().equal(at::tensor({101.0F, 101.0F})));
}

TEST_CASE("calibration on request needs no gradients and goes on") {
  ActivationQuantizer rounding = make({ActivationRule::kObserved, 0});
  rounding(at::full({1}, 3.0F));
  REQUIRE(scale_of(rounding) == 0.0F);
  rounding.set_calibrating(true);
  const at::NoGradGuard no_grad;
  rounding(at::full({1}, 127.0F));
  REQUIRE(scale_of(rounding) == 1.0F);
  rounding.set_calibrating(false);
  rounding(at::full({1}, 1270.0F));
  REQUIRE(scale_of(rounding) == 1.0F);
}

TEST_CASE("a learned scale receives gradients when calibration is over") {
  ActivationQuantizer rounding = make({ActivationRule::kLearned, 1});
  const at::Tensor x = at::tensor({0.3F, 1.0F}).requires_grad_();
  rounding(x).sum().backward();
  REQUIRE_FALSE(rounding.scale().grad().defined());
  rounding(x).sum().backward();
  REQUIRE(rounding.scale().grad().sizes() == at::IntArrayRef({1, 1, 1}));
  REQUIRE(rounding.scale().grad().item<float>() != 0.0F);
}

TEST_CASE("a forward pass that is computed again in backward is not counted again") {
  ActivationQuantizer rounding = make({ActivationRule::kObserved, 8});
  const at::Tensor x = at::full({3}, 2.0F).requires_grad_();
  rounding(x);
  Recomputed::apply(x, reinterpret_cast<int64_t>(&rounding)).sum().backward();
  REQUIRE(rounding.batches().item<int64_t>() == 1);
  REQUIRE(scale_of(rounding) == static_cast<float>(2.0 / 127));
}

TEST_CASE("calibration refuses what no scale can hold") {
  ActivationQuantizer rounding = make({});
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    REQUIRE_THROWS_WITH(rounding(at::tensor({1.0F, bad})),
                        "calibration: up.input_activation_scale: expected finite activations, got NaN or an "
                        "infinity");
    REQUIRE_THROWS_AS(rounding.set_scale(bad), qat::ArgumentError);
  }
  REQUIRE(rounding.batches().item<int64_t>() == 0);
  REQUIRE_THROWS_AS(make({}, "int7"), qat::ArgumentError);
  REQUIRE_THROWS_AS(make({}, "int8_token").set_scale(1.0), qat::ArgumentError);
  for (const char* format : {"int8_token", "q8_0"}) {
    REQUIRE_THROWS_AS(make({}, format).observe(at::tensor({1.0F})), qat::ArgumentError);
  }
}

TEST_CASE("a set scale is calibrated, a copy has its own, and a disabled one rounds nothing") {
  ActivationQuantizer rounding = make({ActivationRule::kObserved, 4});
  rounding.set_scale(0.5);
  const auto copy = rounding.clone();
  const at::Tensor x = at::tensor({0.3F, 70.0F});
  REQUIRE(rounding(x).equal(at::tensor({0.5F, 63.5F})));
  copy->set_scale(0.25);
  REQUIRE(scale_of(rounding) == 0.5F);
  rounding.set_enabled(false);
  REQUIRE(rounding(x).equal(x));
}

TEST_CASE("a call in steps: the parts of a batch calibrate, round and pass gradients as the whole does") {
  for (const char* format : {"int8_tensor_static", "int8_token"}) {
    ActivationQuantizer whole = make({ActivationRule::kLearned, 1}, format);
    ActivationQuantizer steps = make({ActivationRule::kLearned, 1}, format);
    const at::Tensor x = at::tensor({0.3F, 1.0F, -4.0F, 0.7F}).reshape({2, 2}).requires_grad_();
    const at::Tensor doubled = x.detach() * 2, ones = at::ones_like(doubled);
    const at::Tensor calibrated = whole(x);
    REQUIRE(steps.calibrates() == whole.has_scale());
    if (steps.calibrates()) steps.observe(at::tensor({1.0F, 4.0F}));
    REQUIRE_FALSE(steps.calibrates());
    REQUIRE(steps.values(x).equal(calibrated));
    REQUIRE_FALSE(steps.values(x).requires_grad());
    const at::Tensor larger = doubled.clone().requires_grad_();
    whole(larger).sum().backward();
    const qat::ActivationGradients one = steps.backward(ones[0], doubled[0]);
    const qat::ActivationGradients two = steps.backward(ones[1], doubled[1]);
    REQUIRE(at::stack({one.input, two.input}).equal(larger.grad()));
    REQUIRE(one.scale.defined() == steps.has_scale());
    if (!steps.has_scale()) continue;
    REQUIRE(larger.grad().eq(0).sum().item<int64_t>() == 1);  // -8 is clipped
    // Two float32 sums.
    REQUIRE((one.scale + two.scale).item<float>() ==
            Approx(whole.scale().grad().item<float>()).epsilon(1e-6));
    steps.scale().set_requires_grad(false);
    REQUIRE_FALSE(steps.backward(ones[0], doubled[0]).scale.defined());
    steps.set_enabled(false);
    REQUIRE(steps.values(doubled).is_same(doubled));
    REQUIRE(steps.backward(ones, doubled).input.is_same(ones));
    steps.set_calibrating(true);
    REQUIRE_FALSE(steps.calibrates());
  }
}

TEST_CASE("a quantizer rounds what goes into its product and what comes out") {
  qat::Quantizer quantizer("up.weight", {"int8_channel"}, {});
  quantizer.add_activations({"int8_tensor_static", "int8_tensor_static"}, {ActivationRule::kObserved, 1},
                            at::kCPU);
  REQUIRE(quantizer.input()->name() == "up.input_activation_scale");
  REQUIRE(quantizer.output()->name() == "up.output_activation_scale");
  quantizer.input()->set_scale(0.5);
  quantizer.output()->set_scale(2.0);
  const at::Tensor w = at::tensor({2.0F, -1.0F, 0.5F, 1.0F}).reshape({2, 2});
  const at::Tensor x = at::tensor({0.3F, 0.9F}).reshape({1, 2}),
                   x_hat = at::tensor({0.5F, 1.0F}).reshape({1, 2});
  const qat::Quantizer plain("up.weight", {"int8_channel"}, {});
  const at::Tensor product = plain.linear(x_hat, w, {});
  REQUIRE(quantizer.linear(x, w, {}).equal((product / 2.0).round() * 2.0));
  quantizer.set_enabled(false);
  REQUIRE(quantizer.linear(x, w, {}).equal(x.matmul(w.t())));
}
