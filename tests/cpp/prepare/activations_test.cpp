// Activations of qat::nn layers from the policy to the checkpoint, and back from a checkpoint.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>

#include <cmath>

#include "models.hpp"
#include "qat/core/error.hpp"
#include "qat/nn/kv_slot.hpp"
#include "qat/nn/linear.hpp"
#include "qat/prepare/take_up.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using qat::Policy;

/// up -> ReLU -> down, and keys that it keeps.
struct NetImpl : torch::nn::Module, qat::nn::HasKvSlots {
  NetImpl()
      : up(register_module("up", qat::nn::Linear(8, 16))),
        down(register_module("down", qat::nn::Linear(16, 4))) {}
  at::Tensor forward(const at::Tensor& x) {
    at::Tensor hidden = up(x).relu();
    if (keys) hidden = (*keys)(hidden);
    return down(hidden);
  }
  std::vector<qat::nn::KvSlot> kv_slots() override {
    return {{"attention",
             {"later"},
             [this](std::shared_ptr<qat::ActivationQuantizer> one,
                    const std::shared_ptr<qat::ActivationQuantizer>&) { keys = std::move(one); }}};
  }

  qat::nn::Linear up, down;
  std::shared_ptr<qat::ActivationQuantizer> keys;
};
TORCH_MODULE(Net);

Policy policy(const std::string& rule = "observed", const std::string& extra = "") {
  return Policy::from_json(R"({"rules": [{"match": ".*", "kind": "linear", "weight": "int8_channel",
    "input": "int8_tensor_static", "output": "int8_tensor_static"}], "estimator": {"kind": "lsq"},
    "activation_scales": {"rule": ")" +
                           rule + R"(", "batches": 2})" + extra + "}");
}

at::Tensor rounded(const at::Tensor& x, const at::Tensor& scale) {
  const at::Tensor s = scale.reshape({});
  return (x / s).round().clamp(-128, 127) * s;
}

}  // namespace

TEST_CASE("activations calibrate in passes that record gradients, and forward is the closed formula") {
  at::manual_seed(1);
  Net net;
  qat::PreparedModel model = qat::prepare(net.ptr(), policy());
  REQUIRE(model.activations().size() == 4);
  const at::Tensor x = at::randn({5, 8});
  {
    const at::NoGradGuard no_grad;
    net->forward(x * 9);
  }
  for (const auto& activation : model.activations()) REQUIRE(activation->scale().item<float>() == 0.0F);
  net->forward(x);
  net->forward(x * 2);
  net->forward(x * 50);
  const auto& [in, out, in2, out2] = std::tie(model.activations()[0], model.activations()[1],
                                              model.activations()[2], model.activations()[3]);
  REQUIRE(in->name() == "up.input_activation_scale");
  REQUIRE(out2->name() == "down.output_activation_scale");
  REQUIRE(in->scale().item<float>() == static_cast<float>((x * 2).abs().max().item<double>() / 127.0));
  const at::NoGradGuard no_grad;
  const auto w = [&](size_t i) { return model.quantizers()[i]->weight(model.slots()[i].get(), at::kFloat); };
  const at::Tensor hidden =
      rounded(at::linear(rounded(x, in->scale()), w(0), net->up->bias), out->scale()).relu();
  const at::Tensor expected =
      rounded(at::linear(rounded(hidden, in2->scale()), w(1), net->down->bias), out2->scale());
  REQUIRE(net->forward(x).equal(expected));
  model.set_enabled(false);
  REQUIRE(net->forward(x).equal(
      at::linear(at::linear(x, net->up->weight, net->up->bias).relu(), net->down->weight, net->down->bias)));
}

TEST_CASE("learned activation scales are parameters beside those of the weights") {
  Net net;
  qat::PreparedModel model =
      qat::prepare(net.ptr(), policy("learned", R"(, "kv_cache": "int8_tensor_static")"));
  std::vector<std::string> names;
  for (const auto& scale : model.scale_parameters()) names.push_back(scale.name);
  REQUIRE(names == std::vector<std::string>{"up.weight_scales", "down.weight_scales",
                                            "up.input_activation_scale", "up.output_activation_scale",
                                            "down.input_activation_scale", "down.output_activation_scale",
                                            "attention.k_cache_scale", "attention.v_cache_scale"});
  const at::Tensor x = at::randn({5, 8});
  for (int batch = 0; batch < 2; ++batch) net->forward(x);
  net->forward(x).square().sum().backward();
  for (const auto& activation : model.activations()) {
    const bool read = activation->name() != "attention.v_cache_scale";
    REQUIRE(activation->scale().grad().defined() == read);
  }
}

TEST_CASE("a checkpoint holds the scales, of layers that share keys too, and gives them back") {
  const Policy all = policy("observed", R"(, "kv_cache": "int8_tensor_static")");
  Net net;
  qat::PreparedModel model = qat::prepare(net.ptr(), all);
  model.set_calibrating(true);
  const at::Tensor x = at::randn({5, 8});
  {
    const at::NoGradGuard no_grad;
    net->forward(x);
  }
  model.set_calibrating(false);
  const qat::QuantizedCheckpoint checkpoint = qat::freeze(model);
  const at::Tensor key = checkpoint.floats.at("attention.k_cache_scale");
  REQUIRE(key.dim() == 0);
  REQUIRE(key.item<float>() > 0.0F);
  REQUIRE(key.equal(checkpoint.floats.at("later.k_cache_scale")));
  REQUIRE(checkpoint.floats.count("up.input_activation_scale") == 1);

  Net other;
  qat::PreparedModel taken = qat::prepare(other.ptr(), all);
  qat::take_up(taken, checkpoint);
  const at::NoGradGuard no_grad;
  REQUIRE(other->forward(x).equal(net->forward(x)));
  const qat::QuantizedCheckpoint again = qat::freeze(taken);
  for (const auto& [name, tensor] : checkpoint.quantized) {
    REQUIRE(at::equal(tensor.codes, again.quantized.at(name).codes));
    REQUIRE(at::equal(tensor.scales, again.quantized.at(name).scales));
  }
  for (const auto& [name, tensor] : checkpoint.floats) REQUIRE(at::equal(tensor, again.floats.at(name)));
  REQUIRE(model.report()[0].input == "int8_tensor_static");
}

TEST_CASE("layers that cannot round their activations are refused") {
  const auto tied = std::make_shared<qat::test::TiedImpl>(false);
  REQUIRE_THROWS_AS(qat::prepare(tied, policy()), qat::UnsupportedError);
  const auto plain = Policy::from_json(R"({"rules": [], "kv_cache": "int8_tensor_static"})");
  REQUIRE_THROWS_AS(qat::prepare(tied, plain), qat::UnsupportedError);
}

TEST_CASE("a checkpoint on other grids is not taken up") {
  Net net;
  qat::PreparedModel model = qat::prepare(net.ptr(), policy());
  const qat::QuantizedCheckpoint checkpoint = qat::freeze(model);
  Net other;
  const auto four = Policy::from_json(
      R"({"rules": [{"match": ".*", "kind": "linear", "weight": "int4_channel"}], "estimator": {"kind": "lsq"}})");
  qat::PreparedModel taken = qat::prepare(other.ptr(), four);
  const at::Tensor before = other->up->weight.detach().clone();
  REQUIRE_THROWS_WITH(qat::take_up(taken, checkpoint),
                      "take_up: up.weight: expected a tensor on int4_channel, got one on int8_channel");
  REQUIRE(other->up->weight.equal(before));
}
