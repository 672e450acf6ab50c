#include "arch/decoder_table.hpp"
#include "arch/families.hpp"

// Gemma 4, the decoder of all sizes. As Gemma 3, but norms multiply with w; the layers without a window have
// heads of their own size, of which a quarter turns, and may take their values from their keys; the last
// layers may share the keys of earlier ones and be wider; some sizes embed tokens once more for each layer,
// one adds experts. (transformers models/gemma4, gemma4_unified; llama.cpp conversion/gemma.py)

namespace qat::arch {
namespace {

std::vector<TensorRule> tensors() {
  using enum TensorKind;
  using enum Where;
  constexpr RowOrder kSame = RowOrder::kSame;
  return sandwich_tensors({
      // A buffer in Hugging Face's model.
      {"model.layers.{i}.layer_scalar", "blk.{i}.layer_output_scale.weight", kScale},
      {"model.layers.{i}.per_layer_input_gate.weight", "blk.{i}.inp_gate.weight", kMatrix, kSame, false,
       kLayerInputs},
      {"model.layers.{i}.per_layer_projection.weight", "blk.{i}.proj.weight", kMatrix, kSame, false,
       kLayerInputs},
      {"model.layers.{i}.post_per_layer_input_norm.weight", "blk.{i}.post_norm.weight", kNorm, kSame, false,
       kLayerInputs},
      {"model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight", kLayerEmbedding, kSame, false,
       kLayerInputs},
      {"model.per_layer_model_projection.weight", "per_layer_model_proj.weight", kMatrix, kSame, false,
       kLayerInputs},
      {"model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight", kNorm, kSame, false,
       kLayerInputs},
      {"model.layers.{i}.router.proj.weight", "blk.{i}.ffn_gate_inp.weight", kRouter, kSame, false, kExperts},
      {"model.layers.{i}.router.scale", "blk.{i}.ffn_gate_inp.scale", kScale, kSame, false, kExperts},
      // llama.cpp multiplies an expert's output with it, wherever it comes from.
      {"model.layers.{i}.router.per_expert_scale", "blk.{i}.ffn_down_exps.scale", kScale, kSame, false,
       kExperts},
      {"model.layers.{i}.experts.gate_up_proj", "blk.{i}.ffn_gate_up_exps.weight", kMatrix, kSame, false,
       kExperts},
      {"model.layers.{i}.experts.down_proj", "blk.{i}.ffn_down_exps.weight", kMatrix, kSame, false, kExperts},
      {"model.layers.{i}.pre_feedforward_layernorm_2.weight", "blk.{i}.pre_ffw_norm_2.weight", kNorm, kSame,
       false, kExperts},
      {"model.layers.{i}.post_feedforward_layernorm_1.weight", "blk.{i}.post_ffw_norm_1.weight", kNorm, kSame,
       false, kExperts},
      {"model.layers.{i}.post_feedforward_layernorm_2.weight", "blk.{i}.post_ffw_norm_2.weight", kNorm, kSame,
       false, kExperts},
  });
}

std::vector<ConfigKey> config() {
  using enum ValueType;
  using enum Absent;
  using enum Condition;
  return layered_config(
      "gemma4",
      {
          {{"global_head_dim"}, "gemma4.attention.key_length", kU32, kOmit, kAlways, PerLayer::kFullHeadDim},
          {{"global_head_dim"},
           "gemma4.attention.value_length",
           kU32,
           kOmit,
           kAlways,
           PerLayer::kFullHeadDim},
          {{"head_dim"}, "gemma4.attention.key_length_swa", kU32},
          {{"head_dim"}, "gemma4.attention.value_length_swa", kU32},
          {{"layer_types"},
           "gemma4.attention.sliding_window_pattern",
           kBool,
           kOmit,
           kAlways,
           PerLayer::kSliding},
          {{"num_kv_shared_layers"}, "gemma4.attention.shared_kv_layers", kU32, kZero},
          {{"hidden_size_per_layer_input"}, "gemma4.embedding_length_per_layer_input", kU32, kZero},
          {{"global_head_dim"}, "gemma4.rope.dimension_count", kU32, kOmit, kAlways, PerLayer::kFullHeadDim},
          {{"head_dim"}, "gemma4.rope.dimension_count_swa", kU32},
          {{"num_experts"}, "gemma4.expert_count", kU32, kError, kExperts},
          {{"top_k_experts"}, "gemma4.expert_used_count", kU32, kError, kExperts},
          {{"moe_intermediate_size"}, "gemma4.expert_feed_forward_length", kU32, kError, kExperts},
      });
}

}  // namespace

const Family& gemma4() {
  static const Family family{
      .name = "gemma4",
      .model_types = {"gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified"},
      .hf_class = "Gemma4ForCausalLM",
      .gguf_architecture = "gemma4",
      .tensors = tensors(),
      .config = config(),
      .hf_prefixes = multimodal_prefixes(),
      .defaults = {{"rms_norm_eps", 1e-6}, {"tie_word_embeddings", true}},
      .implied = {{"use_bidirectional_attention", Implied::kCausal}, {"attention_bias", Implied::kOff}},
      .row_counts = {{"vocab_size", "token_embd.weight"},
                     {"vocab_size_per_layer_input", "per_layer_token_embd.weight"}},
      .gguf_only = {kRopeDivisors},
      .hf_only = {"model.vision_tower.*", "model.audio_tower.*", "model.embed_vision.*",
                  "model.embed_audio.*", "model.vision_embedder.*"},
      .norm_offset = 0.0,
      .qk_norm = true,
      .v_norm = true,
      .attention_scale = AttentionScale::kOne,
      .embedding_scale = EmbeddingScale::kSqrtHidden,
      .activation_key = "hidden_activation",
      .activation = "gelu_pytorch_tanh",
      .layers = {.full_every = 6, .ends_full = true, .full_head_dim = 512},
      .rope = {.theta = 1e6, .type = RopeType::kProportional, .share = 0.25},
      .sliding_rope = Rope{.theta = 1e4},
      .always_divisors = true,
      .character_bpe = "gemma4",
      .visible_tokens = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
                         "<tool_response|>", "<|\"|>"},
  };
  return family;
}

}  // namespace qat::arch
