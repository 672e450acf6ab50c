// Learned scales from prepare to the file: legal at every value that training can give them.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <unistd.h>

#include <filesystem>

#include "models.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/nn/linear.hpp"
#include "qat/ops/ops.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using qat::test::all;
using qat::test::ConvNet;
using qat::test::Tied;

/// Scales as a wild optimizer may leave them: moved, turned around, 0, tiny, large.
void shake(const at::Tensor& scales, int round) {
  const at::NoGradGuard no_grad;
  const at::Tensor pick = at::rand_like(scales);
  at::Tensor next = scales * (at::randn_like(scales) * 0.3 + 1.0);
  next = at::where(pick < 0.1, -next, next);
  next = at::where(pick > 0.9, at::zeros_like(next), next);
  next = at::where((pick > 0.8) & (pick < 0.85), next * 1e-9, next);
  next = at::where((pick > 0.85) & (pick < 0.9), next * 10.0, next);
  scales.copy_(round == 0 ? scales : next);
}

struct TemporaryPath {
  ~TemporaryPath() { std::filesystem::remove(path); }
  std::string path = std::filesystem::temp_directory_path() /
                     ("qat_learned_" + std::to_string(::getpid()) + ".qat.safetensors");
};

/// Differences between two tensors as numbers: 0 and -0 are one.
int64_t differing(const at::Tensor& one, const at::Tensor& two) {
  return one.ne(two).sum().item<int64_t>();
}

}  // namespace

TEST_CASE("prepare starts learned scales by the search, as parameters beside the module's") {
  at::manual_seed(3);
  Tied net(true);
  auto model = qat::prepare(net.ptr(), all("q4_0", "lsq"));
  const auto scales = model.scale_parameters();
  REQUIRE(scales.size() == 2);
  REQUIRE(scales[0].name == "embed.weight_scales");
  REQUIRE(scales[1].name == "up.weight_scales");
  REQUIRE(at::equal(scales[1].value, qat::ops::choose_scales(net->up->weight.detach(), "q4_0")));
  REQUIRE(net->named_parameters().size() == 2);

  const at::Tensor tokens = at::tensor({1, 2, 9}, at::kLong);
  {
    const auto scope = model.quantized();
    net->forward(tokens).square().sum().backward();
  }
  for (const auto& scale : scales) {
    REQUIRE(scale.value.grad().defined());
    REQUIRE(scale.value.grad().abs().sum().item<float>() > 0.0F);
  }
  REQUIRE(net->embed->weight.grad().defined());
}

TEST_CASE("without learned scales there are no scale parameters") {
  ConvNet net;
  auto model = qat::prepare(net.ptr(), all("int4_channel"));
  REQUIRE(model.scale_parameters().empty());
  model.initialize_scales();
  REQUIRE(model.scale_parameters().empty());
}

TEST_CASE("only the rules that ask for it learn their scales") {
  Tied net(false);
  const auto model = qat::prepare(net.ptr(), qat::Policy::from_json(R"({"rules": [
      {"match": "up", "weight": "q4_0", "estimator": {"kind": "lsq"}}, {"match": ".*", "weight": "q8_0"}]})"));
  REQUIRE(model.scale_parameters().size() == 1);
  REQUIRE(model.scale_parameters()[0].name == "up.weight_scales");
}

TEST_CASE("whatever becomes of the scales, the file decodes to the numbers that forward used") {
  at::manual_seed(4);
  const TemporaryPath file;
  int refused = 0, decoded = 0;
  for (const auto name : qat::grid::names()) {
    if (qat::grid::find(name).info().is_float) continue;
    auto layer = qat::nn::Linear(256, 6, /*bias=*/false);
    auto model = qat::prepare(layer.ptr(), all(std::string(name), "lsq"));
    const at::Tensor scales = model.scale_parameters().at(0).value;
    for (int round = 0; round < 6; ++round) {
      CAPTURE(name, round);
      shake(scales, round);
      at::Tensor forward;
      try {
        forward = layer->quantizer->fake_quantize(layer->weight).detach();
      } catch (const qat::NumericError&) {
        // beyond what the file can hold: refused by both, and the start is good again
        REQUIRE_THROWS_AS(qat::freeze(model), qat::NumericError);
        model.initialize_scales();
        ++refused;
        continue;
      }
      qat::save(qat::freeze(model), file.path);
      REQUIRE(differing(qat::weight_of(qat::load(file.path), "weight"), forward) == 0);
      REQUIRE(differing(layer->quantizer->weight(layer->weight, at::kFloat), forward) == 0);
      ++decoded;
    }
  }
  REQUIRE(decoded > 4 * refused);  // the test would be empty otherwise
}

TEST_CASE("reports and checkpoints see the learned scales, and never the training grid") {
  at::manual_seed(5);
  auto layer = qat::nn::Linear(64, 4, /*bias=*/false);
  auto model = qat::prepare(layer.ptr(), all("q4_0", "lsq"));
  const auto before = model.report().at(0);
  {
    const at::NoGradGuard no_grad;
    model.scale_parameters()[0].value.mul_(3.0);
  }
  const auto after = model.report().at(0);
  REQUIRE(after.relative_error > before.relative_error);
  REQUIRE(after.bytes == before.bytes);
  const auto checkpoint = qat::freeze(model);
  REQUIRE(checkpoint.floats.empty());
  REQUIRE(checkpoint.quantized.size() == 1);

  layer->quantizer->set_training_grid("q8_0", layer->weight);
  const auto meanwhile = qat::freeze(model);
  REQUIRE(meanwhile.quantized.at("weight").scheme.weight == "q4_0");
  REQUIRE(at::equal(qat::weight_of(meanwhile, "weight"),
                    qat::ops::fake_quantize(layer->weight.detach(), "q4_0", {{}, qat::ScaleRule::kSearch})));
  REQUIRE(model.report().at(0).relative_error == before.relative_error);
}

TEST_CASE("after loading other weights the scales can start anew, in place") {
  auto layer = qat::nn::Linear(64, 4, /*bias=*/false);
  auto model = qat::prepare(layer.ptr(), all("q4_0", "lsq"));
  const at::Tensor scales = model.scale_parameters()[0].value;
  {
    const at::NoGradGuard no_grad;
    layer->weight.copy_(at::randn({4, 64}) * 5.0);
  }
  model.initialize_scales(qat::ScaleRule::kReference);
  REQUIRE(model.scale_parameters()[0].value.is_same(scales));
  REQUIRE(
      at::equal(scales, qat::ops::choose_scales(layer->weight.detach(), "q4_0", qat::ScaleRule::kReference)));
}

TEST_CASE("a clone of a layer learns scales of its own") {
  auto layer = qat::nn::Linear(64, 4);
  auto model = qat::prepare(layer.ptr(), all("q4_0", "lsq"));
  const auto copy = std::static_pointer_cast<qat::nn::LinearImpl>(layer->clone());
  REQUIRE_FALSE(copy->quantizer->scales().is_same(layer->quantizer->scales()));
  REQUIRE(at::equal(copy->quantizer->scales(), layer->quantizer->scales()));
}
