#include "qat/arch/family.hpp"

#include <algorithm>
#include <set>

#include "catch.hpp"
#include "qat/core/error.hpp"

using Catch::Contains;
using namespace qat::arch;

namespace {

const Family& llama() {
  return find_by_model_type("llama");
}

/// The tensors of a SmolLM2-135M GGUF, as llama.cpp names them.
std::vector<std::string> smollm2_tensors() {
  std::vector<std::string> names{"token_embd.weight", "output_norm.weight"};
  for (int layer = 0; layer < 30; ++layer) {
    for (const char* part : {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate",
                             "ffn_up", "ffn_down"}) {
      names.push_back("blk." + std::to_string(layer) + "." + part + ".weight");
    }
  }
  return names;
}

std::string replaced(std::string_view pattern, const std::string& layer) {
  std::string name(pattern);
  if (const auto hole = name.find("{i}"); hole != std::string::npos) name.replace(hole, 3, layer);
  return name;
}

}  // namespace

TEST_CASE("every rule leads from each name to the other, and back to itself") {
  for (const Family* family : families()) {
    for (const TensorRule& rule : family->tensors) {
      for (const char* layer : {"0", "9", "10", "123"}) {
        const std::string hf = replaced(rule.hf, layer);
        const std::string gguf = replaced(rule.gguf, layer);
        INFO(hf << " <-> " << gguf);
        const auto there = hf_to_gguf(*family, hf);
        const auto back = gguf_to_hf(*family, gguf);
        REQUIRE(there.has_value());
        REQUIRE(back.has_value());
        REQUIRE(there->name == gguf);
        REQUIRE(back->name == hf);
        REQUIRE(there->rule == &rule);
        REQUIRE(back->rule == &rule);
        const bool per_layer = rule.hf.find("{i}") != std::string_view::npos;
        REQUIRE(there->layer == (per_layer ? std::optional<std::int64_t>(std::stoi(layer)) : std::nullopt));
      }
    }
  }
}

TEST_CASE("the 272 tensors of SmolLM2 have 272 Hugging Face names") {
  const auto names = smollm2_tensors();
  REQUIRE(names.size() == 272);
  std::set<std::string> hf;
  for (const std::string& name : names) {
    const auto mapped = gguf_to_hf(llama(), name);
    INFO(name);
    REQUIRE(mapped.has_value());
    REQUIRE_FALSE(mapped->rule->optional);
    hf.insert(mapped->name);
  }
  REQUIRE(hf.size() == 272);
  REQUIRE(hf.count("model.layers.29.post_attention_layernorm.weight") == 1);
}

TEST_CASE("llama: the names that mislead, the kinds, and the rows that move") {
  const auto rule = [](const char* hf) { return *hf_to_gguf(llama(), hf); };
  REQUIRE(rule("model.layers.3.post_attention_layernorm.weight").name == "blk.3.ffn_norm.weight");
  REQUIRE(rule("model.layers.3.self_attn.o_proj.weight").name == "blk.3.attn_output.weight");
  REQUIRE(rule("model.embed_tokens.weight").rule->kind == TensorKind::kEmbedding);
  REQUIRE(rule("lm_head.weight").rule->kind == TensorKind::kHead);
  REQUIRE(rule("lm_head.weight").rule->optional);
  REQUIRE(rule("model.norm.weight").rule->kind == TensorKind::kNorm);
  std::set<std::string> moved;
  for (const TensorRule& each : llama().tensors) {
    if (each.rows != RowOrder::kSame) moved.insert(std::string(each.gguf));
    if (each.hf.find(".bias") != std::string_view::npos) REQUIRE(each.kind == TensorKind::kBias);
  }
  REQUIRE(moved == std::set<std::string>{"blk.{i}.attn_q.weight", "blk.{i}.attn_k.weight",
                                         "blk.{i}.attn_q.bias", "blk.{i}.attn_k.bias"});
  REQUIRE(rule("model.layers.0.self_attn.q_proj.weight").rule->rows == RowOrder::kRopeQueryHeads);
  REQUIRE(rule("model.layers.0.self_attn.k_proj.weight").rule->rows == RowOrder::kRopeKeyHeads);
}

TEST_CASE("qwen3: norms on q and k, and no row moves") {
  const Family& family = find_by_gguf_architecture("qwen3");
  REQUIRE(family.qk_norm);
  REQUIRE(hf_to_gguf(family, "model.layers.1.self_attn.q_norm.weight")->name == "blk.1.attn_q_norm.weight");
  REQUIRE(std::all_of(family.tensors.begin(), family.tensors.end(),
                      [](const TensorRule& rule) { return rule.rows == RowOrder::kSame; }));
  REQUIRE_FALSE(hf_to_gguf(llama(), "model.layers.1.self_attn.q_norm.weight").has_value());
}

TEST_CASE("names that only look right have no counterpart") {
  for (const char* name :
       {"", "model.embed_tokens", "model.layers..input_layernorm.weight",
        "model.layers.01.input_layernorm.weight", "model.layers.-1.input_layernorm.weight",
        "model.layers.1x.input_layernorm.weight", "model.layers.+1.input_layernorm.weight",
        "model.layers.1.1.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight",
        "model.layers.99999999999999999999.input_layernorm.weight", "xmodel.layers.1.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight ", "blk.1.attn_q.weight"}) {
    INFO(name);
    REQUIRE_FALSE(hf_to_gguf(llama(), name).has_value());
  }
  REQUIRE_FALSE(gguf_to_hf(llama(), "blk.1.attn_q").has_value());
}

TEST_CASE("derived tensors are known to have no counterpart") {
  REQUIRE(matches_any(llama().gguf_only, "rope_freqs.weight"));
  REQUIRE_FALSE(gguf_to_hf(llama(), "rope_freqs.weight").has_value());
  REQUIRE(matches_any(llama().hf_only, "model.layers.7.self_attn.rotary_emb.inv_freq"));
  REQUIRE_FALSE(matches_any(llama().hf_only, "model.layers.7.self_attn.q_proj.weight"));
}

TEST_CASE("an unknown family is refused with the known ones") {
  REQUIRE_THROWS_AS(find_by_model_type("gpt2"), qat::UnsupportedError);
  REQUIRE_THROWS_WITH(
      find_by_model_type("gpt2"),
      "model_type: expected one of gemma3_text, gemma3, gemma4_text, gemma4, gemma4_unified_text, "
      "gemma4_unified, llama, qwen2, qwen3, got \"gpt2\"");
  REQUIRE_THROWS_WITH(
      find_by_gguf_architecture("bert"),
      "general.architecture: expected one of gemma3, gemma4, llama, qwen2, qwen3, got \"bert\"");
}

TEST_CASE(
    "the configuration tables hold the keys that llama.cpp requires, each once and under its architecture") {
  for (const Family* family : families()) {
    std::set<std::string> keys;
    for (const ConfigKey& key : family->config) {
      INFO(key.gguf);
      REQUIRE_FALSE(key.hf.empty());
      REQUIRE(std::string(key.gguf).rfind(std::string(family->gguf_architecture) + ".", 0) == 0);
      REQUIRE(keys.insert(std::string(key.gguf)).second);
    }
    for (const char* required :
         {"context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
          "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base"}) {
      REQUIRE(keys.count(std::string(family->gguf_architecture) + "." + required) == 1);
    }
  }
}

TEST_CASE("old and new spellings of the rope base are both listed, the new one first") {
  const auto& config = llama().config;
  const auto base = std::find_if(config.begin(), config.end(),
                                 [](const ConfigKey& key) { return key.gguf == "llama.rope.freq_base"; });
  REQUIRE(base != config.end());
  REQUIRE(base->hf == std::vector<std::string_view>{"rope_parameters.rope_theta", "rope_theta"});
  REQUIRE(base->type == ValueType::kF32);
  REQUIRE(base->absent == Absent::kRopeBase);
}
