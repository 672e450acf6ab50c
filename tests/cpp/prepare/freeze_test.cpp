// What leaves a prepared model: the report and the checkpoint.

#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>

#include <cmath>

#include "models.hpp"
#include "qat/ops/fake_quantize.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using qat::Policy;
using qat::test::all;
using qat::test::ConvNet;
using qat::test::Tied;

Policy mixed() {
  return Policy::from_json(R"({"rules": [{"match": "conv", "weight": "int2_channel"},
                                         {"match": "fc", "weight": "q4_0"}]})");
}

}  // namespace

TEST_CASE("the frozen numbers are those of the forward pass, and everything else is kept") {
  at::manual_seed(1);
  ConvNet net;
  net->forward(at::randn({4, 2, 6, 6}));  // moves the running statistics
  const auto model = qat::prepare(net.ptr(), mixed());
  const auto checkpoint = qat::freeze(model, "{\"layers\": 2}", "tokenizer.json");
  REQUIRE(checkpoint.quantized.size() == 2);
  REQUIRE(at::equal(qat::weight_of(checkpoint, "conv.weight"),
                    qat::ops::fake_quantize(net->conv->weight.detach(), "int2_channel")));
  REQUIRE(at::equal(qat::weight_of(checkpoint, "fc.weight"),
                    qat::ops::fake_quantize(net->fc->weight.detach(), "q4_0")));
  REQUIRE(checkpoint.floats.size() == 6);
  for (const auto& buffer : net->named_buffers()) {
    REQUIRE(at::equal(checkpoint.floats.at(buffer.key()), buffer.value()));
    REQUIRE(checkpoint.floats.at(buffer.key()).scalar_type() == buffer.value().scalar_type());
  }
  REQUIRE(at::equal(checkpoint.floats.at("fc.bias"), net->fc->bias));
  REQUIRE(checkpoint.config == "{\"layers\": 2}");
  REQUIRE(checkpoint.tokenizer == "tokenizer.json");
  REQUIRE(checkpoint.policy == mixed().to_json());
  REQUIRE(checkpoint.aliases.empty());
}

TEST_CASE("weights read back from a checkpoint give the prepared model's outputs, bit for bit") {
  at::manual_seed(2);
  ConvNet net;
  net->eval();
  auto model = qat::prepare(net.ptr(), mixed());
  const at::Tensor x = at::randn({4, 2, 6, 6});
  at::Tensor expected;
  {
    const auto scope = model.quantized();
    expected = net->forward(x).detach();
  }
  const auto checkpoint = qat::freeze(model);
  ConvNet fresh;
  fresh->eval();
  const at::NoGradGuard no_grad;
  for (auto& parameter : fresh->named_parameters()) {
    parameter.value().copy_(qat::weight_of(checkpoint, parameter.key()));
  }
  for (auto& buffer : fresh->named_buffers()) buffer.value().copy_(qat::weight_of(checkpoint, buffer.key()));
  REQUIRE(at::equal(fresh->forward(x), expected));
}

TEST_CASE("a tied weight is stored once") {
  Tied net(true);
  const auto checkpoint = qat::freeze(qat::prepare(net.ptr(), all("q8_0")));
  REQUIRE(checkpoint.quantized.size() == 2);
  REQUIRE(checkpoint.floats.empty());  // not even the head's dead tensor
  REQUIRE(checkpoint.aliases == std::map<std::string, std::string>{{"head.weight", "embed.weight"}});
}

TEST_CASE("a disabled model freezes the same numbers: the switch is for scoring") {
  Tied net(false);
  auto model = qat::prepare(net.ptr(), all("q8_0"));
  const auto before = qat::freeze(model);
  model.set_enabled(false);
  REQUIRE(
      at::equal(qat::freeze(model).quantized.at("up.weight").codes, before.quantized.at("up.weight").codes));
}

TEST_CASE("the report counts codes and scales, and measures the error") {
  at::manual_seed(3);
  ConvNet net;
  const auto report = qat::prepare(net.ptr(), mixed()).report();
  REQUIRE(report.size() == 5);
  REQUIRE(report[0].name == "conv.weight");
  REQUIRE(report[0].grid == "int2_channel");
  REQUIRE(report[0].bytes == 4 * (5 + 4));  // 4 rows of 18 2-bit codes (5 bytes) and a float32 scale
  REQUIRE(report[0].bits_per_weight == 8.0 * 36 / 72);
  REQUIRE(report[1].name == "norm.weight");
  REQUIRE(report[1].grid == "f32");
  REQUIRE(report[1].bits_per_weight == 32.0);
  REQUIRE(report[1].relative_error == 0.0);
  REQUIRE(report[3].name == "fc.weight");
  REQUIRE(report[3].bits_per_weight == 4.5);  // 18 bytes for 32 weights
  const at::Tensor latent = net->fc->weight.detach().to(at::kDouble);
  const at::Tensor error = qat::ops::fake_quantize(net->fc->weight.detach(), "q4_0").to(at::kDouble) - latent;
  // The same sums in another order.
  REQUIRE(report[3].relative_error == Approx((error.norm() / latent.norm()).item<double>()).epsilon(1e-12));
}

TEST_CASE("tied tensors are reported once, zeros have no error") {
  Tied net(true);
  {
    const at::NoGradGuard no_grad;
    net->up->weight.zero_();
  }
  const auto report = qat::prepare(net.ptr(), all("q4_0")).report();
  REQUIRE(report.size() == 2);
  REQUIRE(report[1].relative_error == 0.0);
}

TEST_CASE("float grids report their own width and error") {
  const at::Tensor latent = at::ones({2, 4}) / 3;
  const auto half = qat::report_tensor("w", qat::SlotKind::kLinear, latent, {"f16"});
  REQUIRE(half.bytes == 16);
  REQUIRE(half.relative_error > 0.0);
  REQUIRE(half.relative_error < 0x1p-11);  // half an ulp of an 11-bit significand
  REQUIRE(qat::report_tensor("b", qat::SlotKind::kOther, latent.to(at::kBFloat16), {}).grid == "bf16");
}

TEST_CASE("the table is aligned and ends with totals") {
  const std::vector<qat::TensorReport> report{
      {"embed.weight", qat::SlotKind::kEmbedding, {10, 32}, "q8_0", 8.5, 340, 0.00521},
      {"b", qat::SlotKind::kOther, {10}, "f32", 32.0, 40, 0.0}};
  REQUIRE(qat::to_string(report) ==
          "tensor        kind       shape        grid  bits/weight   error  bytes\n"
          "embed.weight  embedding  10 x 32      q8_0        8.500  0.52 %    340\n"
          "b             other      10           f32        32.000       -     40\n"
          "total                    330 weights              9.212            380\n");
  REQUIRE_THAT(qat::to_string(std::vector<qat::TensorReport>{}), Catch::Contains("0 weights"));
}
