#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>

#include <cstdio>
#include <filesystem>
#include <stdexcept>

#include "qat/core/error.hpp"
#include "qat/models/decoder.hpp"
#include "qat/ptq/apply.hpp"
#include "qat/ptq/awq.hpp"
#include "qat/ptq/guided.hpp"
#include "shapes_of_models.hpp"

#include "catch.hpp"

using namespace qat;

namespace {

/// A decoder with the same weights for the same seed, and a text for it.
std::shared_ptr<models::Decoder> tiny(int64_t vocabulary = 50) {
  at::manual_seed(3);
  models::DecoderConfig config;
  config.vocab_size = vocabulary;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.tie_word_embeddings = true;
  return std::make_shared<models::Decoder>(config);
}

at::Tensor text() {
  return at::randint(50, {12, 16}, at::detail::createCPUGenerator(1), at::TensorOptions().dtype(at::kLong));
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor d = (a - b).to(at::kDouble);
  return (d * d).mean().item<double>();
}

}  // namespace

TEST_CASE("GPTQ on a decoder, as docs/ptq.md shows it") {
  const at::NoGradGuard no_grad;
  const auto decoder = tiny();
  const at::Tensor windows = text();
  const at::Tensor expected = decoder->forward(windows);
  const std::string path =
      (std::filesystem::temp_directory_path() / "libqat-ptq-test.qat.safetensors").string();
  const auto plain = tiny();
  const PreparedModel rounded = prepare(plain, Policy::preset("gguf-q4_0"));

  auto model = qat::prepare(decoder, qat::Policy::preset("gguf-q4_0").with_scale(qat::ScaleRule::kLearned));
  qat::ptq::GptqOptions options;
  options.damping = 0.02;
  for (const auto& layer : qat::ptq::apply_gptq(model, decoder->stages(), windows, options)) {
    std::printf("%s %.4f\n", layer.name.c_str(), layer.output_error);
  }
  qat::save(qat::freeze(model), path);

  CHECK(difference(decoder->forward(windows), expected) < difference(plain->forward(windows), expected));
  std::filesystem::remove(path);
}

TEST_CASE("guided rounding of a decoder, as docs/ptq.md shows it") {
  const auto decoder = tiny();
  const at::Tensor windows = text();
  auto model = prepare(decoder, Policy::preset("gguf-q4_0").with_scale(ScaleRule::kLearned));
  const auto logits = [&](const at::Tensor& tokens) { return decoder->forward(tokens); };
  std::vector<ptq::RoundedTensor> layers;
  std::vector<int64_t> totals;
  const auto show = [&](int64_t done, int64_t total, const std::string&) {
    CHECK((1 <= done && done <= total));
    totals.push_back(total);
  };

  layers = qat::ptq::apply_guided(model, decoder->stages(), logits, windows, {.seed = 1}, {.progress = show});

  CHECK(layers.size() == 14);
  CHECK(totals.front() == 12);  // windows first
  CHECK(totals.back() != 12);   // then what apply_gptq counts
  for (const auto& quantizer : model.quantizers()) CHECK((!quantizer || quantizer->enabled()));

  auto held = prepare(tiny(), Policy::preset("gguf-q4_0"));
  const auto unasked = [](const at::Tensor&) -> at::Tensor { throw std::logic_error("asked"); };
  CHECK_THROWS_AS(ptq::apply_guided(held, decoder->stages(), unasked, windows), ArgumentError);
}

TEST_CASE("a tied table is rounded first, and once") {
  const auto decoder = tiny();
  const at::Tensor windows = text();
  const Policy policy = Policy::from_json(R"({"rules": [{"match": ".*", "weight": "q4_0"}]})");
  const at::Tensor before = decoder->named_parameters()["model.embed_tokens.weight"].detach().clone();
  auto model = prepare(decoder, policy.with_scale(ScaleRule::kLearned));
  std::vector<int64_t> totals;
  const auto record = [&](int64_t done, int64_t total, const std::string&) {
    CHECK(done <= total);
    totals.push_back(total);
  };
  const auto found = ptq::apply_gptq(model, decoder->stages(), windows, {}, {.batch = 4, .progress = record});
  REQUIRE(found.size() == 15);
  CHECK(found[0].name == "model.embed_tokens.weight");
  CHECK(found[0].output_error > 0.0);
  CHECK(totals ==
        std::vector<int64_t>(2 * 9 * 3, 9 * 3));  // the float model, then the model as it is rounded
  CHECK(difference(decoder->named_parameters()["model.embed_tokens.weight"], before) > 0.0);
  for (const auto& quantizer : model.quantizers()) CHECK((!quantizer || quantizer->enabled()));
}

TEST_CASE("the rows of a large table are rounded alike, in whichever part they are") {
  const at::NoGradGuard no_grad;
  const int64_t rows = (int64_t{1} << 25) / 64 + 8;  // eight rows more than a part of 2^25 weights
  const auto decoder = tiny(rows);
  const at::Tensor table = decoder->named_parameters()["model.embed_tokens.weight"];
  ptq::InputMoments moments(64);
  for (const at::Tensor& windows : text().split(8)) moments.add(decoder->hidden(windows));
  ptq::GptqOptions options;
  options.scale = ptq::ScaleSource::kReference;
  const auto rounded = [&](int64_t first) {
    return ptq::gptq(table.detach().narrow(0, first, 16).contiguous(), moments.second(), "int4_channel",
                     options);
  };
  const ptq::Solution start = rounded(0), end = rounded(rows - 16);
  const Policy policy = Policy::from_json(
      R"({"rules": [{"match": "model.embed_tokens", "weight": "int4_channel"}, {"match": ".*", "weight": "f32"}]})");
  auto model = prepare(decoder, policy.with_scale(ScaleRule::kLearned));
  CHECK(ptq::apply_gptq(model, decoder->stages(), text(), options).size() == 1);
  const at::Tensor scales = model.scale_parameters()[0].value;
  CHECK(at::equal(table.narrow(0, 0, 16), start.latent));
  CHECK(at::equal(table.narrow(0, rows - 16, 16), end.latent));
  CHECK(at::equal(scales.narrow(0, 0, 16), start.scales));
  CHECK(at::equal(scales.narrow(0, rows - 16, 16), end.scales));
}

namespace {

/// A mixture of experts with the same weights each time, and only its experts on a grid.
std::shared_ptr<models::Decoder> mixture() {
  at::manual_seed(3);
  return std::make_shared<models::Decoder>(models::gemma4_experts());
}

PreparedModel with_experts_on_a_grid(const std::shared_ptr<models::Decoder>& decoder) {
  const Policy policy = Policy::from_json(
      R"({"rules": [{"match": ".*experts.*", "weight": "int4_channel"}, {"match": ".*", "weight": "f32"}]})");
  return prepare(decoder, policy.with_scale(ScaleRule::kLearned));
}

constexpr const char* kGateUp = "model.layers.0.experts.gate_up_proj";

}  // namespace

TEST_CASE("experts are rounded by the tokens that are sent to them") {
  const at::NoGradGuard no_grad;
  const at::Tensor windows = text();
  const auto decoder = mixture(), plain = mixture();
  const at::Tensor before = decoder->named_parameters()[kGateUp].detach().clone();
  auto model = with_experts_on_a_grid(decoder);
  const auto start = with_experts_on_a_grid(plain);
  const auto found = ptq::apply_gptq(model, decoder->stages(), windows);
  REQUIRE(found.size() == 6);
  CHECK(found[0].name == kGateUp);
  CHECK(found[0].output_error > 0.0);
  const at::Tensor rounded = weight_of(freeze(model), kGateUp), nearest = weight_of(freeze(start), kGateUp);
  // In the first layer all tokens go where the float model sends them.
  std::vector<at::Tensor> state = {windows};
  for (const Stage& stage : plain->stages()) {
    state = stage.run(state);
    if (stage.experts > 0) break;
  }
  const at::Tensor& counts = state.end()[-2];
  for (int64_t expert = 0, first = 0; expert < counts.size(0); ++expert) {
    const int64_t count = counts[expert].item<int64_t>();
    REQUIRE(count > 0);
    const at::Tensor rows = state.back().narrow(0, first, count);
    const at::Tensor expected = at::linear(rows, before[expert]);
    CHECK(difference(at::linear(rows, rounded[expert]), expected) <
          difference(at::linear(rows, nearest[expert]), expected));
    first += count;
  }
}

TEST_CASE("an expert that no token chooses stays as it was, and so do its scales") {
  const at::NoGradGuard no_grad;
  const auto decoder = mixture();
  auto model = with_experts_on_a_grid(decoder);
  const at::Tensor stack = decoder->named_parameters()[kGateUp], before = stack.clone();
  const at::Tensor scales = model.scale_parameters()[0].value, scales_before = scales.clone();
  ptq::apply_gptq(model, decoder->stages(), at::zeros({1, 1}, at::kLong));  // two of five experts
  int64_t changed = 0;
  for (int64_t expert = 0; expert < 5; ++expert) {
    const int64_t rows = stack.size(1);
    const bool same = at::equal(stack[expert], before[expert]);
    CHECK(same ==
          at::equal(scales.narrow(0, expert * rows, rows), scales_before.narrow(0, expert * rows, rows)));
    changed += same ? 0 : 1;
  }
  CHECK(changed == 2);
}

TEST_CASE("guided rounding and AWQ take models with experts") {
  const auto decoder = mixture();
  auto model = with_experts_on_a_grid(decoder);
  const auto logits = [&](const at::Tensor& tokens) { return decoder->forward(tokens); };
  CHECK(ptq::apply_guided(model, decoder->stages(), logits, text()).size() == 6);
  const at::NoGradGuard no_grad;
  const auto other = mixture();
  auto folded = with_experts_on_a_grid(other);
  CHECK(ptq::apply_awq(folded, other->stages(), text()).empty());  // nothing folds into experts
  CHECK(decoder->forward(text()).isfinite().all().item<bool>());
}

TEST_CASE("AWQ leaves the float decoder, and quantizers are enabled again") {
  const at::NoGradGuard no_grad;
  const auto decoder = tiny();
  const at::Tensor windows = text();
  const at::Tensor expected = decoder->forward(windows);
  auto model = prepare(decoder, Policy::preset("gguf-q4_0").with_scale(ScaleRule::kLearned));
  CHECK(ptq::apply_awq(model, decoder->stages(), windows).size() == 8);
  for (const auto& quantizer : model.quantizers()) CHECK((!quantizer || quantizer->enabled()));
  model.set_enabled(false);
  // float32: every weight was multiplied and divided once
  CHECK((decoder->forward(windows) - expected).abs().max().item<float>() <
        1e-5F * expected.abs().max().item<float>());
}

TEST_CASE("a stage must name slots of the model") {
  const auto decoder = tiny();
  auto model = prepare(decoder, Policy::preset("gguf-q4_0").with_scale(ScaleRule::kLearned));
  std::vector<Stage> stages = decoder->stages();
  stages[0].weights.emplace_back("model.layers.7.up");
  CHECK_THROWS_WITH(
      ptq::apply_gptq(model, stages, text()),
      "apply_gptq: model.layers.7.up: expected a slot of the prepared model, got none of that name");
  stages = decoder->stages();
  stages[0].producers = {"model.layers.7.norm"};
  CHECK_THROWS_AS(ptq::apply_awq(model, stages, text()), ArgumentError);
}
