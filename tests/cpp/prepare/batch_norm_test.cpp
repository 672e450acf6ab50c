// BatchNorm beside quantized weights: frozen, or folded into the layer before it.

#include "qat/prepare/batch_norm.hpp"

#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/normalization.h>

#include "models.hpp"
#include "qat/core/error.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using Catch::Matchers::Contains;
using qat::test::ConvNet;
using torch::nn::Sequential;

// float32 sums of a few hundred products against the same sums in another order.
constexpr double kRelative = 1e-4, kAbsolute = 1e-5;

/// A BatchNorm that changes its input.
template <class Norm>
void randomise(Norm& norm) {
  const at::NoGradGuard no_grad;
  norm->running_mean.copy_(at::randn_like(norm->running_mean));
  norm->running_var.copy_(at::rand_like(norm->running_var) + 0.1);
  norm->weight.copy_(at::randn_like(norm->weight));
  norm->bias.copy_(at::randn_like(norm->bias));
}

/// Folds "0" into "1" of layer -> norm and compares the outputs on `input`.
template <class Layer, class Norm>
void expect_same_output(Layer layer, Norm norm, const at::Tensor& input) {
  randomise(norm);
  Sequential net(layer, norm);
  net->eval();
  const at::Tensor before = net->forward(input).detach();
  qat::fold_batch_norm(*net, "0", "1");
  REQUIRE(at::equal(net->forward(input), layer->forward(input)));  // the norm is the identity, to the bit
  REQUIRE(at::allclose(net->forward(input), before, kRelative, kAbsolute));
  net->train();  // does not bring it back
  REQUIRE(at::equal(net->forward(input), layer->forward(input)));
}

}  // namespace

TEST_CASE("folding keeps the output of every kind of layer") {
  using namespace torch::nn;
  at::manual_seed(0);
  expect_same_output(Linear(5, 7), BatchNorm1d(7), at::randn({3, 5}));
  expect_same_output(Linear(LinearOptions(5, 7).bias(false)), BatchNorm1d(7), at::randn({3, 5}));
  expect_same_output(Conv1d(Conv1dOptions(4, 6, 3).groups(2)), BatchNorm1d(6), at::randn({2, 4, 9}));
  expect_same_output(Conv2d(Conv2dOptions(4, 6, 3).bias(false)), BatchNorm2d(6), at::randn({2, 4, 9, 9}));
  expect_same_output(Conv2d(Conv2dOptions(6, 6, 3).groups(6)), BatchNorm2d(6), at::randn({2, 6, 9, 9}));
  expect_same_output(Conv3d(Conv3dOptions(2, 3, 2)), BatchNorm3d(3), at::randn({2, 2, 4, 4, 4}));
  expect_same_output(ConvTranspose1d(ConvTranspose1dOptions(4, 6, 3)), BatchNorm1d(6), at::randn({2, 4, 5}));
  expect_same_output(ConvTranspose2d(ConvTranspose2dOptions(4, 6, 3).groups(2).bias(false)), BatchNorm2d(6),
                     at::randn({2, 4, 5, 5}));
}

TEST_CASE("a folded norm leaves the tree, and the layer's new bias is in it") {
  at::manual_seed(1);
  ConvNet net;
  randomise(net->norm);
  qat::fold_batch_norm(*net, "conv", "norm");
  std::vector<std::string> names;
  for (const auto& parameter : net->named_parameters()) names.push_back(parameter.key());
  REQUIRE(names == std::vector<std::string>{"conv.weight", "conv.bias", "fc.weight", "fc.bias"});
  REQUIRE(net->named_buffers().is_empty());
  REQUIRE(net->conv->bias.requires_grad());
  REQUIRE(net->conv->options.bias());

  const auto model = qat::prepare(net.ptr(), qat::test::all("int4_channel"));
  const auto checkpoint = qat::freeze(model);
  REQUIRE(checkpoint.quantized.contains("conv.weight"));
  REQUIRE(checkpoint.floats.contains("conv.bias"));
  REQUIRE(checkpoint.floats.size() == 2);
}

TEST_CASE("a norm without gain and bias folds as well") {
  at::manual_seed(2);
  torch::nn::BatchNorm2d norm(torch::nn::BatchNormOptions(3).affine(false));
  norm->running_mean.copy_(at::randn({3}));
  norm->running_var.copy_(at::rand({3}) + 0.1);
  torch::nn::Conv2d conv(torch::nn::Conv2dOptions(2, 3, 1));
  Sequential net(conv, norm);
  net->eval();
  const at::Tensor input = at::randn({2, 2, 4, 4}), before = net->forward(input);
  qat::fold_batch_norm(*net, "0", "1");
  REQUIRE(at::allclose(net->forward(input), before, kRelative, kAbsolute));
}

TEST_CASE("what cannot be folded is refused by path, and left as it was") {
  using namespace torch::nn;
  ConvNet net;
  const at::Tensor weight = net->conv->weight.detach().clone();
  REQUIRE_THROWS_WITH(qat::fold_batch_norm(*net, "conv", "bn"),
                      Contains("fold_batch_norm: bn: expected the path"));
  REQUIRE_THROWS_WITH(qat::fold_batch_norm(*net, "conv.x", "norm"), Contains("conv.x"));
  REQUIRE_THROWS_WITH(qat::fold_batch_norm(*net, "conv", "fc"), Contains("fc: expected a BatchNorm"));
  REQUIRE_THROWS_WITH(qat::fold_batch_norm(*net, "norm", "norm"), Contains("expected a torch::nn Linear"));
  REQUIRE_THROWS_WITH(qat::fold_batch_norm(*net, "fc", "norm"), Contains("BatchNorm's 4 channels, got 3"));
  REQUIRE(at::equal(net->conv->weight, weight));
  REQUIRE(net->named_children().size() == 3);

  Sequential batch_only(Linear(2, 3), BatchNorm1d(BatchNormOptions(3).track_running_stats(false)));
  REQUIRE_THROWS_AS(qat::fold_batch_norm(*batch_only, "0", "1"), qat::ArgumentError);
  Sequential layer_norm(Linear(2, 3), LayerNorm(LayerNormOptions({3})));
  REQUIRE_THROWS_AS(qat::fold_batch_norm(*layer_norm, "0", "1"), qat::ArgumentError);
}

TEST_CASE("a frozen norm keeps its statistics and trains its gain and bias") {
  at::manual_seed(3);
  ConvNet net;
  net->train();
  REQUIRE(qat::freeze_batch_norm(*net) == 1);
  const at::Tensor mean = net->norm->running_mean.clone(), variance = net->norm->running_var.clone();
  net->forward(at::randn({4, 2, 6, 6})).sum().backward();
  REQUIRE(at::equal(net->norm->running_mean, mean));
  REQUIRE(at::equal(net->norm->running_var, variance));
  REQUIRE(net->norm->weight.grad().defined());
  REQUIRE(net->conv->is_training());
  net->train();
  net->forward(at::randn({4, 2, 6, 6}));
  REQUIRE_FALSE(at::equal(net->norm->running_mean, mean));  // train() takes it back
}

TEST_CASE("a layer norm is no norm of the batch") {
  Sequential net(torch::nn::Linear(2, 3), torch::nn::LayerNorm(torch::nn::LayerNormOptions({3})));
  REQUIRE(qat::freeze_batch_norm(*net) == 0);
  const auto model = qat::prepare(net.ptr(), qat::test::all("int8_channel"));
  REQUIRE(model.slots().size() == 1);
  REQUIRE(qat::freeze(model).floats.contains("1.weight"));
}
