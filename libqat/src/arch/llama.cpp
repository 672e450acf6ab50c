#include "arch/decoder_table.hpp"
#include "arch/families.hpp"

// Llama 1 to 3, SmolLM, and everything else of class LlamaForCausalLM.
// (transformers models/llama; llama.cpp convert_hf_to_gguf.py)

namespace qat::arch {
namespace {

std::vector<TensorRule> tensors() {
  using enum TensorKind;
  using enum RowOrder;
  return decoder_tensors(
      {kRopeQueryHeads, kRopeKeyHeads},
      {
          {"model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias", kBias, kRopeQueryHeads, true},
          {"model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias", kBias, kRopeKeyHeads, true},
          {"model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias", kBias, kSame, true},
          {"model.layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias", kBias, kSame, true},
          {"model.layers.{i}.mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias", kBias, kSame, true},
          {"model.layers.{i}.mlp.up_proj.bias", "blk.{i}.ffn_up.bias", kBias, kSame, true},
          {"model.layers.{i}.mlp.down_proj.bias", "blk.{i}.ffn_down.bias", kBias, kSame, true},
      });
}

}  // namespace

const Family& llama() {
  static const Family family{
      .name = "llama",
      .model_types = {"llama"},
      .hf_class = "LlamaForCausalLM",
      .gguf_architecture = "llama",
      .tensors = tensors(),
      .config =
          decoder_config("llama", Condition::kExplicitHeadDim,
                         {{{"head_dim"}, "llama.rope.dimension_count", ValueType::kU32, Absent::kHeadDim}}),
      .gguf_only = {"rope_freqs.weight"},
      .hf_only = {"model.layers.{i}.self_attn.rotary_emb.inv_freq"},
      .norm_offset = 0.0,
      .qk_norm = false,
      .embedding_scale = EmbeddingScale::kOne,
      .activation = "silu",
  };
  return family;
}

}  // namespace qat::arch
