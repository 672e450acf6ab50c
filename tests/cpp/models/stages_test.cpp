#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randint.h>

#include <set>

#include "qat/models/decoder.hpp"
#include "shapes_of_models.hpp"

#include "catch.hpp"

using namespace qat;

namespace {

models::DecoderConfig tiny(bool tied) {
  models::DecoderConfig config = models::llama(tied);
  config.attention_bias = true;
  return config;
}

}  // namespace

TEST_CASE("the stages compute what the decoder does, bit for bit, for every shape") {
  auto shapes = models::shapes();
  shapes.emplace_back("biases", tiny(true));
  for (const auto& [name, config] : shapes) {
    INFO(name);
    at::manual_seed(3);
    models::Decoder decoder(config);
    const at::Tensor tokens =
        at::randint(50, {2, 7}, at::detail::createCPUGenerator(1), at::TensorOptions().dtype(at::kLong));
    std::vector<at::Tensor> state = {tokens};
    for (const Stage& stage : decoder.stages()) state = stage.run(state);
    CHECK(at::equal(state.back(), decoder.hidden(tokens)));
  }
}

TEST_CASE("every linear layer but routers stands in one stage, and producers are parameters") {
  auto shapes = models::shapes();
  shapes.emplace_back("biases", tiny(false));
  for (const auto& [name, config] : shapes) {
    INFO(name);
    models::Decoder decoder(config);
    std::set<std::string> seen, all;
    const auto parameters = decoder.named_parameters();
    for (const Stage& stage : decoder.stages()) {
      for (const std::string& weight : stage.weights) {
        CHECK(seen.insert(weight).second);
        CHECK(stage.experts == (parameters[weight].dim() == 3 ? config.experts.count : 0));
        const int64_t width = parameters[weight].size(-1);
        CHECK((stage.producer_rows.empty() || static_cast<int64_t>(stage.producer_rows.size()) == width));
      }
      for (const std::string& producer : stage.producers) CHECK(parameters.contains(producer));
    }
    for (const auto& item : parameters) {
      const bool table = item.key() == "model.embed_tokens_per_layer.weight" ||
                         (item.key() == "model.embed_tokens.weight" && !config.tie_word_embeddings);
      const bool router = item.key().find("router") != std::string::npos;
      if (item.value().dim() > 1 && !table && !router) all.insert(item.key());
    }
    CHECK(seen == all);
  }
}

TEST_CASE("an input that its layer has used is carried no further") {
  const models::DecoderConfig config = models::gemma4_small();
  models::Decoder decoder(config);
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> state = {at::randint(50, {1, 7}, at::TensorOptions().dtype(at::kLong))};
  int64_t used = 0;
  for (const Stage& stage : decoder.stages()) {
    state = stage.run(state);
    if (stage.weights.front().find("per_layer_projection") == std::string::npos) continue;
    for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
      CHECK(state[static_cast<size_t>(1 + i)].defined() == (i > used));
    }
    ++used;
  }
  CHECK(used == config.num_hidden_layers);
}

TEST_CASE("a stage of experts leaves each expert's rows, in order") {
  const models::DecoderConfig config = models::gemma4_experts();
  at::manual_seed(3);
  models::Decoder decoder(config);
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> state = {
      at::randint(50, {2, 7}, at::detail::createCPUGenerator(1), at::TensorOptions().dtype(at::kLong))};
  int64_t found = 0;
  at::Tensor rows;  // what gate and up of layer 0 multiply with
  for (const Stage& stage : decoder.stages()) {
    state = stage.run(state);
    if (stage.experts == 0) continue;
    const at::Tensor& counts = state.end()[-2];
    CHECK(counts.sum().item<int64_t>() == 2 * 7 * config.experts.per_token);
    CHECK(state.back().size(0) == counts.sum().item<int64_t>());
    if (++found == 1) rows = state.back();
    if (found != 2) continue;
    const auto parameters = decoder.named_parameters();
    const at::Tensor& weight = parameters["model.layers.0.experts.gate_up_proj"];
    int64_t first = 0;
    for (int64_t expert = 0; expert < config.experts.count; ++expert) {
      const int64_t count = counts[expert].item<int64_t>();
      const auto halves = at::linear(rows.narrow(0, first, count), weight[expert]).chunk(2, -1);
      const at::Tensor expected = at::gelu(halves[0], "tanh") * halves[1];
      CHECK(at::allclose(state.back().narrow(0, first, count), expected, 1e-5, 1e-6));  // another GELU kernel
      first += count;
    }
  }
  CHECK(found == 2 * config.num_hidden_layers);
}

TEST_CASE("what a producer gains, the inputs of its stage's weights gain") {
  for (const auto& [name, config] : models::shapes()) {
    at::manual_seed(3);
    models::Decoder decoder(config);
    const at::NoGradGuard no_grad;
    const at::Tensor tokens =
        at::randint(50, {1, 9}, at::detail::createCPUGenerator(1), at::TensorOptions().dtype(at::kLong));
    const auto parameters = decoder.named_parameters();
    std::vector<at::Tensor> state = {tokens};
    for (const Stage& stage : decoder.stages()) {
      const std::vector<at::Tensor> before = stage.run(state);
      for (const std::string& producer : stage.producers) {
        INFO(name << ", " << producer);
        const at::Tensor parameter = parameters[producer], kept = parameter.clone();
        parameter.mul_(2);
        const std::vector<at::Tensor> after = stage.run(state);
        parameter.copy_(kept);
        // A power of two: exact. And nothing else moves.
        CHECK(at::equal(after.back(), before.back() * 2));
        for (size_t i = 0; i + 1 < before.size(); ++i) {
          CHECK((before[i].defined() ? at::equal(after[i], before[i]) : !after[i].defined()));
        }
      }
      state = before;
    }
  }
}

TEST_CASE("a tied head is the last stage's weight, and nothing can be folded into it") {
  for (const bool tied : {true, false}) {
    const std::vector<Stage> stages = models::Decoder(tiny(tied)).stages();
    for (size_t i = 0; i + 1 < stages.size(); ++i) CHECK_FALSE(stages[i].tied);
    CHECK(stages.back().tied == tied);
    CHECK(stages.back().producers.empty() == tied);
    CHECK(stages.back().weights ==
          std::vector<std::string>{tied ? "model.embed_tokens.weight" : "lm_head.weight"});
  }
}

TEST_CASE("stages outlive their decoder") {
  std::vector<Stage> stages;
  {
    models::Decoder decoder(tiny(true));
    stages = decoder.stages();
  }
  std::vector<at::Tensor> state = {at::randint(50, {1, 4}, at::TensorOptions().dtype(at::kLong))};
  for (const Stage& stage : stages) state = stage.run(state);
  CHECK(state.back().sizes() == at::IntArrayRef({1, 4, 32}));
}
