#include "presets.hpp"

#include <array>

namespace qat::policy {
namespace {

// Hugging Face spells a block matrix "model.layers.3.mlp.up_proj"; the base model alone leaves out "model.",
// and models with more than one modality add "language_model.". One prefix expression serves all of them.

// llama.cpp's recipe for Q4_0 after QAT: block matrices 4-bit, the embedding and the head 8-bit, norms float.
constexpr std::string_view kGgufQ4 = R"json({
  "rules": [
    {"match": "(model\\.|language_model\\.)*embed_tokens", "weight": "q8_0"},
    {"match": "(model\\.|language_model\\.)*lm_head", "weight": "q8_0", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\..*_proj", "weight": "q4_0"}
  ]
})json";

// The same tensors, all of them 8-bit.
constexpr std::string_view kGgufQ8 = R"json({
  "rules": [
    {"match": "(model\\.|language_model\\.)*embed_tokens", "weight": "q8_0"},
    {"match": "(model\\.|language_model\\.)*lm_head", "weight": "q8_0", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\..*_proj", "weight": "q8_0"}
  ]
})json";

// Every linear and convolution of any model, one scale per output channel; embeddings stay float.
constexpr std::string_view kInt4Channel = R"json({
  "rules": [
    {"match": ".*", "kind": "linear", "weight": "int4_channel", "optional": true},
    {"match": ".*", "kind": "conv", "weight": "int4_channel", "optional": true}
  ]
})json";

constexpr std::string_view kInt2Channel = R"json({
  "rules": [
    {"match": ".*", "kind": "linear", "weight": "int2_channel", "optional": true},
    {"match": ".*", "kind": "conv", "weight": "int2_channel", "optional": true}
  ]
})json";

// Every linear of any model, one scale per 32 weights of a row. Rows of convolutions (9, 27, 144 weights)
// seldom divide into groups, and compressed-tensors' consumers group linears only: they stay float, as
// embeddings do.
constexpr std::string_view kInt4G32 = R"json({
  "rules": [
    {"match": ".*", "kind": "linear", "weight": "int4_g32"}
  ]
})json";

constexpr std::string_view kInt2G32 = R"json({
  "rules": [
    {"match": ".*", "kind": "linear", "weight": "int2_g32"}
  ]
})json";

// Two bits where most of the weights are, the MLP; attention keeps four, embedding and head eight. ggml's own
// quantizer cannot use the fourth level of q2_0 and scales by the largest weight: the search does both
// better.
constexpr std::string_view kGgufQ2Mixed = R"json({
  "rules": [
    {"match": "(model\\.|language_model\\.)*embed_tokens", "weight": "q8_0"},
    {"match": "(model\\.|language_model\\.)*lm_head", "weight": "q8_0", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\.self_attn\\..*_proj", "weight": "q4_0"},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\..*_proj", "weight": "q2_0"}
  ],
  "estimator": {"kind": "ste", "scale": "search"}
})json";

// What vLLM calls W4A16, in the group size of Google's QAT releases: 4 bits, symmetric, 32 weights a group;
// embedding and head stay bfloat16. Scales and products too, as a bfloat16 model computes them.
constexpr std::string_view kCtW4A16 = R"json({
  "rules": [
    {"match": "(model\\.|language_model\\.)*embed_tokens", "weight": "bf16"},
    {"match": "(model\\.|language_model\\.)*lm_head", "weight": "bf16", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\..*_proj", "weight": "int4_g32@bf16:bf16"}
  ]
})json";

// mlx-lm's default conversion: every linear and the embedding in 4 bits, 64 weights a group, scales and
// biases in the type of the model.
constexpr std::string_view kMlx4 = R"json({
  "rules": [
    {"match": "(model\\.|language_model\\.)*embed_tokens", "weight": "mlx4_g64@bf16"},
    {"match": "(model\\.|language_model\\.)*lm_head", "weight": "mlx4_g64@bf16", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\..*_proj", "weight": "mlx4_g64@bf16"}
  ]
})json";

// The types in Google's Q4_0 files of Gemma 4: what llama.cpp makes of such a file when nothing else is asked
// for. Both tables q6_k, the projection that all layers' inputs come from 16-bit, every other matrix 4-bit,
// experts included; norms, scalars and the router float.
constexpr std::string_view kGemma4Q4 = R"json({
  "rules": [
    {"match": "(model\\.|language_model\\.)*embed_tokens(_per_layer)?", "weight": "q6_k"},
    {"match": "(model\\.|language_model\\.)*lm_head", "weight": "q6_k", "optional": true},
    {"match": "(model\\.|language_model\\.)*per_layer_model_projection", "weight": "bf16", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\.per_layer_(input_gate|projection)", "weight": "q4_0", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\..*_proj", "weight": "q4_0"}
  ]
})json";

// Google's recipe of the mobile Gemma 4 E2B: two bits for the table of tokens and for the double-wide MLPs of
// layers 15 to 34, four for attention and the first MLPs, eight for the gates of the per-layer embedding.
// Inputs and outputs of all these layers, keys and values have static scales of 8 bits. The consumer's own
// rule leaves one of the four levels of two bits unused: hence the search.
constexpr std::string_view kGemma4E2BMobile = R"json({
  "rules": [
    {"match": "(model\\.|language_model\\.)*embed_tokens", "weight": "mobile2", "input": "int8_tensor_static", "output": "int8_tensor_static"},
    {"match": "(model\\.|language_model\\.)*lm_head", "weight": "mobile2", "input": "int8_tensor_static", "output": "int8_tensor_static", "optional": true},
    {"match": "(model\\.|language_model\\.)*embed_tokens_per_layer", "weight": "mobile4_g256", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\.per_layer_(input_gate|projection)", "weight": "mobile8", "input": "int8_tensor_static", "output": "int8_tensor_static", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\.self_attn\\.[qkvo]_proj", "weight": "mobile4", "input": "int8_tensor_static", "output": "int8_tensor_static"},
    {"match": "(model\\.|language_model\\.)*layers\\.(1[5-9]|2\\d|3[0-4])\\.mlp\\.(gate|up|down)_proj", "weight": "mobile2", "input": "int8_tensor_static", "output": "int8_tensor_static", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\.mlp\\.(gate|up|down)_proj", "weight": "mobile4", "input": "int8_tensor_static", "output": "int8_tensor_static"}
  ],
  "estimator": {"kind": "ste", "scale": "search"},
  "kv_cache": "int8_tensor_static"
})json";

// The same of E4B: every MLP in four bits, the table of per-layer embeddings in two.
constexpr std::string_view kGemma4E4BMobile = R"json({
  "rules": [
    {"match": "(model\\.|language_model\\.)*embed_tokens", "weight": "mobile2", "input": "int8_tensor_static", "output": "int8_tensor_static"},
    {"match": "(model\\.|language_model\\.)*lm_head", "weight": "mobile2", "input": "int8_tensor_static", "output": "int8_tensor_static", "optional": true},
    {"match": "(model\\.|language_model\\.)*embed_tokens_per_layer", "weight": "mobile2_g256", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\.per_layer_(input_gate|projection)", "weight": "mobile8", "input": "int8_tensor_static", "output": "int8_tensor_static", "optional": true},
    {"match": "(model\\.|language_model\\.)*layers\\.\\d+\\.(self_attn\\.[qkvo]|mlp\\.(gate|up|down))_proj", "weight": "mobile4", "input": "int8_tensor_static", "output": "int8_tensor_static"}
  ],
  "estimator": {"kind": "ste", "scale": "search"},
  "kv_cache": "int8_tensor_static"
})json";

constexpr std::array<Preset, 12> kPresets{{
    {"gguf-q4_0", "llama.cpp, Ollama, LM Studio: matrices q4_0, embedding and head q8_0", kGgufQ4},
    {"gguf-q8_0", "llama.cpp, Ollama, LM Studio: every matrix q8_0", kGgufQ8},
    {"gguf-q2_0-mixed", "llama.cpp: MLP q2_0, attention q4_0, embedding and head q8_0", kGgufQ2Mixed},
    {"ct-w4a16", "vLLM, transformers: linears of the blocks in 4 bits, groups of 32", kCtW4A16},
    {"mlx-4bit", "mlx-lm: linears and embedding in 4 bits, groups of 64", kMlx4},
    {"gemma4-q4_0", "llama.cpp: Google's Q4_0 recipe of Gemma 4: tables q6_k, other matrices q4_0",
     kGemma4Q4},
    {"gemma4-e2b-mobile", "transformers: Google's 2/4/8-bit recipe of Gemma 4 E2B", kGemma4E2BMobile},
    {"gemma4-e4b-mobile", "transformers: Google's 2/4/8-bit recipe of Gemma 4 E4B", kGemma4E4BMobile},
    {"int4-channel", "any model: linears and convolutions in 4 bits, a scale per row", kInt4Channel},
    {"int2-channel", "any model: linears and convolutions in 2 bits, a scale per row", kInt2Channel},
    {"int4-g32", "any model: linears in 4 bits, groups of 32", kInt4G32},
    {"int2-g32", "any model: linears in 2 bits, groups of 32", kInt2G32},
}};

}  // namespace

std::span<const Preset> all_presets() noexcept {
  return kPresets;
}

}  // namespace qat::policy
