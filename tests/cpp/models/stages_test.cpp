#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>

#include <set>

#include "qat/models/decoder.hpp"

#include "catch.hpp"

using namespace qat;

namespace {

models::DecoderConfig tiny(bool tied) {
  models::DecoderConfig config;
  config.vocab_size = 50;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_hidden_layers = 3;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.tie_word_embeddings = tied;
  config.attention_bias = true;
  return config;
}

}  // namespace

TEST_CASE("the stages compute what the decoder does, bit for bit") {
  for (const bool tied : {true, false}) {
    at::manual_seed(3);
    models::Decoder decoder(tiny(tied));
    const at::Tensor tokens =
        at::randint(50, {2, 7}, at::detail::createCPUGenerator(1), at::TensorOptions().dtype(at::kLong));
    std::vector<at::Tensor> state = {tokens};
    for (const Stage& stage : decoder.stages()) state = stage.run(state);
    CHECK(at::equal(state.back(), decoder.hidden(tokens)));
  }
}

TEST_CASE("every linear layer stands in one stage, and producers are parameters") {
  models::Decoder decoder(tiny(false));
  std::set<std::string> seen, all;
  const auto parameters = decoder.named_parameters();
  for (const Stage& stage : decoder.stages()) {
    for (const std::string& name : stage.weights) {
      CHECK(seen.insert(name).second);
      const int64_t width = parameters[name].size(1);
      CHECK((stage.producer_rows.empty() || static_cast<int64_t>(stage.producer_rows.size()) == width));
    }
    for (const std::string& name : stage.producers) CHECK(parameters.contains(name));
  }
  for (const auto& item : parameters) {
    if (item.value().dim() == 2 && item.key() != "model.embed_tokens.weight") all.insert(item.key());
  }
  CHECK(seen == all);
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
