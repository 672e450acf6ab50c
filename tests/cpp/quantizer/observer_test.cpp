#include "qat/quantizer/observer.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"

namespace {

/// Shows its observer the input again in backward, as activation checkpointing does.
struct Recomputed : torch::autograd::Function<Recomputed> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            int64_t observer) {
    context->saved_data["observer"] = observer;
    context->save_for_backward({x});
    reinterpret_cast<qat::RangeObserver*>(observer)->observe(x, "up");
    return x * 2;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    auto* observer = reinterpret_cast<qat::RangeObserver*>(context->saved_data["observer"].toInt());
    observer->observe(context->get_saved_variables()[0] * 100, "up");
    return {grads[0] * 2, {}};
  }
};

}  // namespace

TEST_CASE("an observer keeps the largest magnitude of the batches it calibrates on") {
  qat::RangeObserver observer;
  observer.observe(at::full({2, 3}, 9.0), "up");
  REQUIRE(observer.largest() == 0.0);  // not calibrating
  observer.set_calibrating(true);
  observer.observe(at::tensor({1.0F, -2.5F}), "up");
  observer.observe(at::tensor({2.0F}).to(at::kBFloat16), "up");
  observer.observe(at::full({0, 4}, 1.0), "up");
  observer.set_calibrating(false);
  observer.observe(at::full({1}, 100.0), "up");
  REQUIRE(observer.largest() == 2.5);
  REQUIRE(observer.batches() == 3);
  REQUIRE(observer.scale() == static_cast<float>(2.5 / 127));

  qat::RangeObserver resumed;
  resumed.restore(observer.largest(), observer.batches());
  REQUIRE(resumed.scale() == observer.scale());
  resumed.reset();
  REQUIRE(resumed.scale() == 0.0F);
  REQUIRE(resumed.batches() == 0);
}

TEST_CASE("a forward pass that is computed again in backward is not counted again") {
  qat::RangeObserver observer;
  observer.set_calibrating(true);
  const at::Tensor x = at::full({3}, 2.0F).requires_grad_();
  Recomputed::apply(x, reinterpret_cast<int64_t>(&observer)).sum().backward();
  REQUIRE(observer.batches() == 1);
  REQUIRE(observer.largest() == 2.0);
}

TEST_CASE("an observer refuses what no scale can hold") {
  qat::RangeObserver observer;
  observer.set_calibrating(true);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    REQUIRE_THROWS_WITH(observer.observe(at::tensor({1.0F, bad}), "layers.3.up"),
                        "observer: layers.3.up: expected finite activations, got NaN or an infinity");
  }
  REQUIRE(observer.batches() == 0);
}
