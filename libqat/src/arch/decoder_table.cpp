#include "arch/decoder_table.hpp"

#include <string>

// (llama.cpp gguf-py/gguf/tensor_mapping.py, constants.py)

namespace qat::arch {
namespace {

std::vector<TensorRule> joined(std::vector<TensorRule> rules, const std::vector<TensorRule>& more) {
  rules.insert(rules.end(), more.begin(), more.end());
  return rules;
}

std::vector<ConfigKey> joined(std::vector<ConfigKey> keys, const std::vector<ConfigKey>& more) {
  keys.insert(keys.end(), more.begin(), more.end());
  return keys;
}

/// What a key is called under its architecture.
std::string under(std::string_view architecture, const char* name) {
  return std::string(architecture) + "." + name;
}

std::vector<ConfigKey> common_config(std::string_view architecture) {
  using enum ValueType;
  return {
      {{"vocab_size"}, under(architecture, "vocab_size"), kU32},
      {{"max_position_embeddings"}, under(architecture, "context_length"), kU32},
      {{"hidden_size"}, under(architecture, "embedding_length"), kU32},
      {{"num_hidden_layers"}, under(architecture, "block_count"), kU32},
  };
}

}  // namespace

std::vector<TensorRule> decoder_tensors(AttentionRows rows, const std::vector<TensorRule>& more) {
  using enum TensorKind;
  return joined(
      {
          {"model.embed_tokens.weight", "token_embd.weight", kEmbedding},
          {"model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", kNorm},
          {"model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", kMatrix, rows.query},
          {"model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", kMatrix, rows.key},
          {"model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", kMatrix},
          {"model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", kMatrix},
          {"model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", kNorm},
          {"model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", kMatrix},
          {"model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight", kMatrix},
          {"model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight", kMatrix},
          {"model.norm.weight", "output_norm.weight", kNorm},
          {"lm_head.weight", "output.weight", kHead, RowOrder::kSame, true},
      },
      more);
}

std::vector<TensorRule> sandwich_tensors(const std::vector<TensorRule>& more) {
  using enum TensorKind;
  using enum Where;
  constexpr RowOrder kSame = RowOrder::kSame;
  return joined(
      {
          {"model.embed_tokens.weight", "token_embd.weight", kEmbedding},
          {"model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", kNorm},
          {"model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", kMatrix},
          {"model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", kMatrix, kSame, false,
           kOwnKeys},
          {"model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", kMatrix, kSame, false,
           kOwnValues},
          {"model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight", kNorm},
          {"model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight", kNorm, kSame, false,
           kOwnKeys},
          {"model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", kMatrix},
          {"model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight", kNorm},
          {"model.layers.{i}.pre_feedforward_layernorm.weight", "blk.{i}.ffn_norm.weight", kNorm},
          {"model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", kMatrix},
          {"model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight", kMatrix},
          {"model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight", kMatrix},
          {"model.layers.{i}.post_feedforward_layernorm.weight", "blk.{i}.post_ffw_norm.weight", kNorm},
          {"model.norm.weight", "output_norm.weight", kNorm},
          {"lm_head.weight", "output.weight", kHead, kSame, true},
      },
      more);
}

std::vector<ConfigKey> decoder_config(std::string_view architecture, Condition head_dim,
                                      const std::vector<ConfigKey>& more) {
  using enum ValueType;
  using enum Absent;
  const auto key = [&](const char* name) { return under(architecture, name); };
  return joined(
      joined(common_config(architecture),
             {
                 {{"intermediate_size"}, key("feed_forward_length"), kU32},
                 {{"num_attention_heads"}, key("attention.head_count"), kU32},
                 {{"num_key_value_heads"}, key("attention.head_count_kv"), kU32, kQueryHeads},
                 {{"head_dim"}, key("attention.key_length"), kU32, kHeadDim, head_dim},
                 {{"head_dim"}, key("attention.value_length"), kU32, kHeadDim, head_dim},
                 {{"rms_norm_eps"}, key("attention.layer_norm_rms_epsilon"), kF32},
                 {{"rope_parameters.rope_theta", "rope_theta"}, key("rope.freq_base"), kF32, kRopeBase},
             }),
      more);
}

std::vector<ConfigKey> layered_config(std::string_view architecture, const std::vector<ConfigKey>& more) {
  using enum ValueType;
  using enum Absent;
  using enum Condition;
  const auto key = [&](const char* name) { return under(architecture, name); };
  return joined(joined(common_config(architecture),
                       {
                           {{"intermediate_size"},
                            key("feed_forward_length"),
                            kU32,
                            kError,
                            kAlways,
                            PerLayer::kFeedForward},
                           {{"num_attention_heads"}, key("attention.head_count"), kU32},
                           {{"num_key_value_heads"},
                            key("attention.head_count_kv"),
                            kU32,
                            kQueryHeads,
                            kAlways,
                            PerLayer::kKeyHeads},
                           {{"rms_norm_eps"}, key("attention.layer_norm_rms_epsilon"), kF32},
                           {{"sliding_window"}, key("attention.sliding_window"), kU32},
                           {{"rope_parameters.full_attention.rope_theta", "rope_theta"},
                            key("rope.freq_base"),
                            kF32,
                            kRopeBase},
                           {{"rope_parameters.sliding_attention.rope_theta", "rope_local_base_freq"},
                            key("rope.freq_base_swa"),
                            kF32,
                            kSlidingRopeBase},
                           {{"final_logit_softcapping"}, key("final_logit_softcapping"), kF32, kOmit},
                       }),
                more);
}

std::vector<std::pair<std::string_view, std::string_view>> multimodal_prefixes() {
  return {
      {"model.language_model.", "model."},     {"language_model.model.", "model."},
      {"language_model.lm_head.", "lm_head."}, {"vision_tower.", "model.vision_tower."},
      {"audio_tower.", "model.audio_tower."},  {"multi_modal_projector.", "model.multi_modal_projector."}};
}

}  // namespace qat::arch
