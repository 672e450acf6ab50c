#include "arch/decoder_table.hpp"

#include <string>

// (llama.cpp gguf-py/gguf/tensor_mapping.py, constants.py)

namespace qat::arch {

std::vector<TensorRule> decoder_tensors(AttentionRows rows, const std::vector<TensorRule>& more) {
  using enum TensorKind;
  std::vector<TensorRule> rules{
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
  };
  rules.insert(rules.end(), more.begin(), more.end());
  return rules;
}

std::vector<ConfigKey> decoder_config(std::string_view architecture, Condition head_dim,
                                      const std::vector<ConfigKey>& more) {
  using enum ValueType;
  using enum Absent;
  using enum Condition;
  const auto key = [&](std::string_view name) { return std::string(architecture) + "." + std::string(name); };
  std::vector<ConfigKey> keys{
      {{"vocab_size"}, key("vocab_size"), kU32},
      {{"max_position_embeddings"}, key("context_length"), kU32},
      {{"hidden_size"}, key("embedding_length"), kU32},
      {{"num_hidden_layers"}, key("block_count"), kU32},
      {{"intermediate_size"}, key("feed_forward_length"), kU32},
      {{"num_attention_heads"}, key("attention.head_count"), kU32},
      {{"num_key_value_heads"}, key("attention.head_count_kv"), kU32, kQueryHeads},
      {{"head_dim"}, key("attention.key_length"), kU32, kHeadDim, head_dim},
      {{"head_dim"}, key("attention.value_length"), kU32, kHeadDim, head_dim},
      {{"rms_norm_eps"}, key("attention.layer_norm_rms_epsilon"), kF32},
      {{"rope_parameters.rope_theta", "rope_theta"}, key("rope.freq_base"), kF32, kRopeBase},
  };
  keys.insert(keys.end(), more.begin(), more.end());
  return keys;
}

}  // namespace qat::arch
