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

constexpr std::array<Preset, 6> kPresets{{
    {"gguf-q4_0", kGgufQ4},
    {"gguf-q8_0", kGgufQ8},
    {"int4-channel", kInt4Channel},
    {"int2-channel", kInt2Channel},
    {"int4-g32", kInt4G32},
    {"int2-g32", kInt2G32},
}};

}  // namespace

std::span<const Preset> all_presets() noexcept {
  return kPresets;
}

}  // namespace qat::policy
