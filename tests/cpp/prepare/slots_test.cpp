// Which weights of a module are slots, ties, and what is refused.

#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>

#include "models.hpp"
#include "qat/core/error.hpp"
#include "qat/nn/embedding.hpp"
#include "qat/nn/linear.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using qat::ArgumentError;
using qat::Policy;
using qat::SlotKind;
using qat::test::all;
using qat::test::ConvNet;
using qat::test::Tied;

/// One of each layer that has a slot, and two that have none.
struct ZooImpl : torch::nn::Module {
  ZooImpl() {
    using namespace torch::nn;
    register_module("a", Linear(4, 4));
    register_module("b", Embedding(4, 4));
    register_module("c", Conv1d(2, 3, 3));
    register_module("d", Conv2d(2, 3, 3));
    register_module("e", Conv3d(2, 3, 3));
    register_module("f", ConvTranspose1d(2, 3, 3));
    register_module("g", ConvTranspose2d(2, 3, 3));
    register_module("h", ConvTranspose3d(2, 3, 3));
    register_module("i", qat::nn::Linear(4, 4));
    register_module("j", qat::nn::Embedding(4, 4));
    register_module("k", BatchNorm2d(4));
    register_module("l", ConvNet());
    register_parameter("scale", at::randn({4}));
  }
};

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const ArgumentError& error) {
    return error.what();
  }
  FAIL("accepted");
  return "";
}

std::vector<std::string> names_of(const std::vector<qat::Slot>& slots) {
  std::vector<std::string> names;
  for (const qat::Slot& slot : slots) names.push_back(slot.name);
  return names;
}

}  // namespace

TEST_CASE("every layer with a matrix is a slot, under its parameter's name") {
  const auto module = std::make_shared<ZooImpl>();
  const auto slots = qat::find_slots(*module);
  REQUIRE(names_of(slots) == std::vector<std::string>{"a.weight", "b.weight", "c.weight", "d.weight",
                                                      "e.weight", "f.weight", "g.weight", "h.weight",
                                                      "i.weight", "j.weight", "l.conv.weight",
                                                      "l.fc.weight"});
  const auto parameters = module->named_parameters();
  for (const qat::Slot& slot : slots) REQUIRE(slot.get().is_same(parameters[slot.name]));
  const std::vector<SlotKind> kinds{SlotKind::kLinear,    SlotKind::kEmbedding, SlotKind::kConv,
                                    SlotKind::kConv,      SlotKind::kConv,      SlotKind::kConv,
                                    SlotKind::kConv,      SlotKind::kConv,      SlotKind::kLinear,
                                    SlotKind::kEmbedding, SlotKind::kConv,      SlotKind::kLinear};
  for (size_t i = 0; i < slots.size(); ++i) {
    REQUIRE(slots[i].kind == kinds[i]);
    const bool own_operators = slots[i].name == "i.weight" || slots[i].name == "j.weight";
    REQUIRE((slots[i].bind != nullptr) == own_operators);
    REQUIRE((slots[i].set != nullptr) != own_operators);
  }
}

TEST_CASE("a layer on its own is a model too, on the stack as well") {
  torch::nn::LinearImpl layer(4, 4);
  REQUIRE(names_of(qat::find_slots(layer)) == std::vector<std::string>{"weight"});
}

TEST_CASE("a transposed convolution has a row, and so a scale, for each input channel") {
  const auto module = std::make_shared<torch::nn::ConvTranspose2dImpl>(
      torch::nn::ConvTranspose2dOptions(2, 3, 5).bias(false));
  const auto checkpoint = qat::freeze(qat::prepare(module, all("int4_channel")));
  REQUIRE(checkpoint.quantized.at("weight").scales.sizes() == at::IntArrayRef{2, 1, 1});
  REQUIRE(checkpoint.quantized.at("weight").codes.sizes() == at::IntArrayRef{2, 75});
}

TEST_CASE("tied weights are one slot, and the registry no longer holds the dead one") {
  Tied net(true);
  REQUIRE(net->parameters().size() == 3);
  const auto slots = qat::find_slots(*net);
  REQUIRE(names_of(slots) == std::vector<std::string>{"embed.weight", "up.weight"});
  REQUIRE(slots[0].aliases == std::vector<std::string>{"head.weight"});
  REQUIRE(slots[0].kind == SlotKind::kEmbedding);
  REQUIRE(net->parameters().size() == 2);
  REQUIRE(net->named_parameters()["embed.weight"].is_same(net->head->weight));
  REQUIRE(names_of(qat::find_slots(*net)) == names_of(slots));  // again, on the mended registry
}

TEST_CASE("layers that exchanged their tensors register what they read") {
  Tied net(false);
  std::swap(net->embed->weight, net->head->weight);
  const auto slots = qat::find_slots(*net);
  REQUIRE(slots.size() == 3);
  const auto parameters = net->named_parameters();
  for (const qat::Slot& slot : slots) REQUIRE(slot.get().is_same(parameters[slot.name]));
  REQUIRE(parameters.size() == 3);
}

TEST_CASE("a submodule registered twice is one slot") {
  struct Shared : torch::nn::Module {
    torch::nn::Linear layer{4, 4};
    Shared() {
      register_module("one", layer);
      register_module("two", layer);
    }
  };
  const auto module = std::make_shared<Shared>();
  REQUIRE(module->parameters().size() == 4);  // LibTorch lists a shared tensor once for each name
  const auto slots = qat::find_slots(*module);
  REQUIRE(names_of(slots) == std::vector<std::string>{"one.weight"});
  REQUIRE(slots[0].aliases == std::vector<std::string>{"two.weight"});
  const auto checkpoint = qat::freeze(qat::prepare(module, all("int8_channel")));
  REQUIRE(checkpoint.aliases ==
          std::map<std::string, std::string>{{"two.weight", "one.weight"}, {"two.bias", "one.bias"}});
}

TEST_CASE("a member that no module registers is refused") {
  Tied net(false);
  net->up->weight = at::randn({32, 32});
  REQUIRE_THAT(
      refusal([&] { qat::find_slots(*net); }),
      Catch::StartsWith("prepare: up.weight: expected the layer's member to be a registered parameter"));
  net->up->weight = at::Tensor();
  REQUIRE_THAT(refusal([&] { qat::find_slots(*net); }), Catch::StartsWith("prepare: up.weight: "));
}

TEST_CASE("quantized latents must be float32, others need not") {
  ConvNet net;
  net->fc->to(at::kDouble);
  REQUIRE(refusal([&] { qat::prepare(net.ptr(), all("int4_channel")); }) ==
          "prepare: fc.weight: expected a float32 latent (others are too coarse to train), got Double");
  const Policy conv_only = Policy::from_json(R"({"rules": [{"match": "conv", "weight": "int4_channel"}]})");
  REQUIRE(qat::prepare(net.ptr(), conv_only).quantizers()[1] == nullptr);
}

TEST_CASE("policy errors pass through with the tensor's name") {
  ConvNet net;
  REQUIRE_THAT(refusal([&] { qat::prepare(net.ptr(), all("q4_0")); }),
               Catch::StartsWith("policy: conv.weight: expected a width that is a multiple of 32"));
  const Policy strict = Policy::from_json(R"({"rules": [{"match": "head", "weight": "q4_0"}]})");
  REQUIRE_THAT(refusal([&] { qat::prepare(net.ptr(), strict); }), Catch::Contains("conv.weight, fc.weight"));
  // A tied name is an alias: the policy sees only the first.
  Tied tied(true);
  const Policy head = Policy::from_json(R"({"rules": [{"match": "head", "weight": "q4_0"}]})");
  REQUIRE_THAT(refusal([&] { qat::prepare(tied.ptr(), head); }), Catch::Contains("rules[0].match"));
  REQUIRE_THROWS_AS(qat::prepare(nullptr, all("q8_0")), ArgumentError);
}

TEST_CASE("an embedding that renormalises itself in forward is unsupported") {
  const auto module =
      std::make_shared<torch::nn::EmbeddingImpl>(torch::nn::EmbeddingOptions(4, 32).max_norm(1.0));
  REQUIRE_THROWS_AS(qat::prepare(module, all("q8_0")), qat::UnsupportedError);
}

TEST_CASE("a user's own layer takes part through its slot") {
  struct Bilinear : torch::nn::Module {
    at::Tensor weight = register_parameter("weight", at::randn({8, 32}));
    at::Tensor forward(const at::Tensor& x) { return x.matmul(weight.t()); }
  };
  const auto module = std::make_shared<Bilinear>();
  REQUIRE(qat::find_slots(*module).empty());
  qat::Slot slot{"weight", SlotKind::kLinear, [=] { return module->weight; },
                 [=](const at::Tensor& value) { module->weight = value; }, nullptr};
  auto model = qat::prepare(module, all("q4_0"), {slot});
  const at::Tensor x = at::randn({3, 32});
  const at::Tensor w_hat = model.quantizers()[0]->fake_quantize(module->weight);
  {
    const auto scope = model.quantized();
    REQUIRE(at::equal(module->forward(x), x.matmul(w_hat.t())));
  }
  REQUIRE(qat::freeze(model).quantized.contains("weight"));

  REQUIRE(refusal([&] { qat::prepare(module, all("q4_0"), {slot, slot}); }) ==
          "prepare: weight: expected each slot name once, got it twice");
  slot.set = nullptr;
  REQUIRE(refusal([&] { qat::prepare(module, all("q4_0"), {slot}); }) ==
          "prepare: weight: expected a slot with `get`, and with `set` or `bind`, got less");
}
