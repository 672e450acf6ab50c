#include "arch/decoder_table.hpp"
#include "arch/families.hpp"

// Gemma 3, the decoder. Norms multiply with 1 + w and stand before and after both halves of a layer; queries
// and keys are normed; five layers with a sliding window and a rotary base of their own, then one without.
// (transformers models/gemma3; llama.cpp conversion/gemma.py)

namespace qat::arch {

const Family& gemma3() {
  using enum ValueType;
  using enum Condition;
  static const Family family{
      .name = "gemma3",
      .model_types = {"gemma3_text", "gemma3"},
      .hf_class = "Gemma3ForCausalLM",
      .gguf_architecture = "gemma3",
      .tensors = sandwich_tensors({}),
      .config = layered_config("gemma3",
                               {
                                   {{"head_dim"}, "gemma3.attention.key_length", kU32},
                                   {{"head_dim"}, "gemma3.attention.value_length", kU32},
                                   {{"layer_types"},
                                    "gemma3.attention.sliding_window_pattern",
                                    kU32,
                                    Absent::kOmit,
                                    kAlways,
                                    PerLayer::kFullEvery},
                               }),
      .hf_prefixes = multimodal_prefixes(),
      .defaults = {{"vocab_size", 262208.0},
                   {"max_position_embeddings", 131072.0},
                   {"num_attention_heads", 8.0},
                   {"num_key_value_heads", 4.0},
                   {"head_dim", 256.0},
                   {"rms_norm_eps", 1e-6},
                   {"sliding_window", 4096.0},
                   {"query_pre_attn_scalar", 256.0},
                   {"tie_word_embeddings", true}},
      .implied = {{"query_pre_attn_scalar", Implied::kAttentionScalar},
                  {"attn_logit_softcapping", Implied::kOff},
                  {"use_bidirectional_attention", Implied::kCausal},
                  {"attention_bias", Implied::kOff}},
      .gguf_only = {},
      .hf_only = {"model.vision_tower.*", "model.multi_modal_projector.*"},
      .norm_offset = 1.0,
      .qk_norm = true,
      .attention_scale = AttentionScale::kQueryPreAttention,
      .embedding_scale = EmbeddingScale::kSqrtHidden,
      .activation_key = "hidden_activation",
      .activation = "gelu_pytorch_tanh",
      .layers = {.full_every = 6},
      .rope = {.theta = 1e6},
      .sliding_rope = Rope{.theta = 1e4},
      .cut_embedding = true,
      .character_bpe = "llama",
  };
  return family;
}

}  // namespace qat::arch
