// Quantized weights in place: what forward sees, where gradients go, and what is put back.

#include <ATen/ops/arange.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>

#include <limits>
#include <stdexcept>

#include "models.hpp"
#include "qat/core/error.hpp"
#include "qat/nn/linear.hpp"
#include "qat/ops/fake_quantize.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using qat::ArgumentError;
using qat::test::all;
using qat::test::ConvNet;
using qat::test::Tied;

at::Tensor w_hat(const at::Tensor& latent, const char* grid) {
  return qat::ops::fake_quantize(latent.detach(), grid);
}

}  // namespace

TEST_CASE("inside the scope forward sees w_hat, outside the latents") {
  at::manual_seed(1);
  ConvNet net;
  net->eval();
  auto model = qat::prepare(net.ptr(), all("int2_channel"));
  const at::Tensor conv = net->conv->weight;
  const at::Tensor x = at::randn({2, 2, 6, 6});
  const at::Tensor before = net->forward(x);
  {
    const auto scope = model.quantized();
    REQUIRE(at::equal(net->conv->weight, w_hat(conv, "int2_channel")));
    REQUIRE_FALSE(at::equal(net->forward(x), before));
    REQUIRE(net->named_parameters()["conv.weight"].is_same(conv));
  }
  REQUIRE(net->conv->weight.is_same(conv));
  REQUIRE(at::equal(net->forward(x), before));
}

TEST_CASE("gradients reach the latents: those of w_hat, straight through") {
  at::manual_seed(2);
  ConvNet net;
  net->eval();
  auto model = qat::prepare(net.ptr(), all("int4_channel"));
  const at::Tensor x = at::randn({2, 2, 6, 6});
  at::Tensor loss;
  {
    const auto scope = model.quantized();
    loss = net->forward(x).square().sum();
  }
  loss.backward();

  // The same network by hand, with w_hat as the leaves.
  const at::Tensor conv = w_hat(net->conv->weight, "int4_channel").requires_grad_();
  const at::Tensor fc = w_hat(net->fc->weight, "int4_channel").requires_grad_();
  const at::Tensor hidden = net->norm(at::conv2d(x, conv)).relu().flatten(1);
  at::linear(hidden, fc, net->fc->bias.detach()).square().sum().backward();
  // The same operations on the same numbers: no tolerance.
  REQUIRE(at::equal(net->conv->weight.grad(), conv.grad()));
  REQUIRE(at::equal(net->fc->weight.grad(), fc.grad()));
  REQUIRE(net->named_parameters()["conv.weight"].grad().defined());
}

TEST_CASE("the policy's estimator decides what passes") {
  at::manual_seed(3);
  const auto layer = std::make_shared<torch::nn::LinearImpl>(torch::nn::LinearOptions(64, 4).bias(false));
  const at::Tensor x = at::randn({5, 64});
  const auto gradient = [&](const char* estimator) {
    auto model = qat::prepare(layer, all("q4_0", estimator));
    layer->zero_grad();
    at::Tensor loss;
    {
      const auto scope = model.quantized();
      loss = layer->forward(x).sum();
    }
    loss.backward();
    return layer->weight.grad().clone();
  };
  const at::Tensor identity = gradient("ste");
  const at::Tensor clipped = gradient("clipped_ste");
  // dL/dw of a sum is the column sum of x in each row; four rows of the same column add up the same terms.
  REQUIRE(at::equal(identity[0], identity[3]));
  const at::Tensor zeroed = clipped.eq(0);
  REQUIRE(zeroed.any().item<bool>());  // -8 .. 7 is lopsided: the far side of some block lies beyond 7.0
  REQUIRE(at::equal(clipped, identity.masked_fill(zeroed, 0)));
}

TEST_CASE("tied weights: both layers see one w_hat, and the latent gets the sum of both gradients") {
  at::manual_seed(4);
  Tied net(true);
  auto model = qat::prepare(net.ptr(), all("q8_0"));
  const at::Tensor tokens = at::arange(10);
  at::Tensor loss;
  {
    const auto scope = model.quantized();
    REQUIRE(net->head->weight.is_same(net->embed->weight));
    loss = net->forward(tokens).square().sum();
  }
  REQUIRE(net->head->weight.is_same(net->embed->weight));
  loss.backward();

  const at::Tensor table = w_hat(net->embed->weight, "q8_0").requires_grad_();
  const at::Tensor up = w_hat(net->up->weight, "q8_0").requires_grad_();
  at::linear(at::linear(at::embedding(table, tokens), up), table).square().sum().backward();
  REQUIRE(at::equal(net->up->weight.grad(), up.grad()));
  // Two terms are added, in either order.
  REQUIRE(at::equal(net->embed->weight.grad(), table.grad()));
}

TEST_CASE("an exception inside the scope puts the latents back") {
  ConvNet net;
  auto model = qat::prepare(net.ptr(), all("int4_channel"));
  const at::Tensor conv = net->conv->weight;
  const auto interrupted = [&] {
    const auto scope = model.quantized();
    throw std::runtime_error("out of data");
  };
  REQUIRE_THROWS_WITH(interrupted(), "out of data");
  REQUIRE(net->conv->weight.is_same(conv));
  {
    const auto scope = model.quantized();
  }
  REQUIRE(net->conv->weight.is_same(conv));
}

TEST_CASE("a latent that the grid cannot hold puts back what was already replaced") {
  ConvNet net;
  auto model = qat::prepare(net.ptr(), all("int4_channel"));
  const at::Tensor conv = net->conv->weight;
  {
    const at::NoGradGuard no_grad;
    net->fc->weight[1][2] = std::numeric_limits<float>::quiet_NaN();
  }
  REQUIRE_THROWS_AS(model.quantized(), qat::NumericError);
  REQUIRE_THROWS_WITH(model.quantized(), Catch::Contains("fc.weight"));
  REQUIRE(net->conv->weight.is_same(conv));
  {
    const at::NoGradGuard no_grad;
    net->fc->weight[1][2] = 0.0F;
  }
  const auto scope = model.quantized();  // nothing is held any more
}

TEST_CASE("scopes do not nest, neither of one model nor of two on the same module") {
  ConvNet net;
  auto model = qat::prepare(net.ptr(), all("int4_channel"));
  auto other = qat::prepare(net.ptr(), all("int2_channel"));
  const at::Tensor conv = net->conv->weight;
  {
    const auto scope = model.quantized();
    const at::Tensor inside = net->conv->weight;
    REQUIRE_THROWS_AS(model.quantized(), ArgumentError);
    REQUIRE_THROWS_WITH(
        other.quantized(),
        "QuantizedScope: conv.weight: expected the latent in place, got a QuantizedScope that "
        "still holds it");
    REQUIRE(net->conv->weight.is_same(inside));
    REQUIRE_THROWS_AS(qat::freeze(model), ArgumentError);
    REQUIRE_THROWS_AS(model.report(), ArgumentError);
    REQUIRE_THROWS_AS(qat::prepare(net.ptr(), all("int8_channel")), ArgumentError);
  }
  REQUIRE(net->conv->weight.is_same(conv));
  const auto scope = other.quantized();
  REQUIRE(at::equal(net->conv->weight, w_hat(conv, "int2_channel")));
}

TEST_CASE("a disabled model is the float model") {
  ConvNet net;
  net->eval();
  auto model = qat::prepare(net.ptr(), all("int2_channel"));
  const at::Tensor x = at::randn({2, 2, 6, 6});
  const at::Tensor before = net->forward(x);
  model.set_enabled(false);
  {
    const auto scope = model.quantized();
    REQUIRE(at::equal(net->forward(x), before));
    REQUIRE_THROWS_AS(model.quantized(), ArgumentError);
  }
  model.set_enabled(true);
  const auto scope = model.quantized();
  REQUIRE_FALSE(at::equal(net->forward(x), before));
}

TEST_CASE("qat::nn layers get a quantizer, and lose it when a policy leaves them float") {
  at::manual_seed(5);
  const auto layer = std::make_shared<qat::nn::LinearImpl>(32, 4);
  const at::Tensor x = at::randn({3, 32});
  const at::Tensor before = layer->forward(x);
  auto model = qat::prepare(layer, all("q4_0"));
  REQUIRE(layer->quantizer == model.quantizers()[0]);
  const at::Tensor expected = at::linear(x, w_hat(layer->weight, "q4_0"), layer->bias);
  REQUIRE(at::equal(layer->forward(x), expected));
  {
    const auto scope = model.quantized();
    REQUIRE(at::equal(layer->forward(x), expected));  // not quantized twice
    REQUIRE_THROWS_AS(model.quantized(), ArgumentError);
  }
  qat::prepare(layer, qat::Policy::from_json(R"({"rules": []})"));
  REQUIRE(layer->quantizer == nullptr);
  REQUIRE(at::equal(layer->forward(x), before));
}

TEST_CASE("a step of the optimizer moves the latents that the next scope quantizes") {
  at::manual_seed(6);
  ConvNet net;
  auto model = qat::prepare(net.ptr(), all("int2_channel"));
  const at::Tensor x = at::randn({8, 2, 6, 6});
  const at::Tensor target = at::randn({8, 3});
  double first = 0.0;
  double last = 0.0;
  for (int step = 0; step < 60; ++step) {
    net->zero_grad();
    at::Tensor loss;
    {
      const auto scope = model.quantized();
      loss = (net->forward(x) - target).square().mean();
    }
    loss.backward();
    const at::NoGradGuard no_grad;
    for (at::Tensor& parameter : net->parameters()) parameter -= 0.05 * parameter.grad();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  REQUIRE(last < 0.7 * first);  // a frozen or dead latent would leave the 2-bit loss where it was
}
