#pragma once

// What differs between model families when a model goes from Hugging Face's names to GGUF's and back. One
// table per family, in `src/arch/<family>.cpp`; readers, writers and policies ask the table and know no
// family by name.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qat/arch/rope.hpp"

namespace qat::arch {

/// The role of a tensor. GGUF stores norms, biases, scales and routers as F32; the others can be quantized.
enum class TensorKind {
  kEmbedding,
  kMatrix,  ///< of one layer's linear map, or [experts, out, in] of all its experts
  kNorm,
  kHead,
  kBias,
  kLayerEmbedding,  ///< a table with a row part for each layer, [vocabulary, layers * width]
  kRouter,          ///< chooses among experts
  kScale,           ///< a vector that something is multiplied with
};

/// "embedding", "matrix", "norm", "head", "bias", "layer_embedding", "router" or "scale".
std::string_view to_string(TensorKind kind) noexcept;

/// The order of a tensor's rows in GGUF. Hugging Face couples row i of a head with row i + D/2 in the rotary
/// embedding; llama.cpp's `llama` architecture couples neighbours, so there the rows of q and k are
/// interleaved head by head.
enum class RowOrder {
  kSame,
  /// `rope_permutation(rows, number of query heads)`.
  kRopeQueryHeads,
  /// `rope_permutation(rows, number of key-value heads)`.
  kRopeKeyHeads,
};

/// Which models, or which of their layers, have a tensor. (`presence` in layers.hpp answers for one model.)
enum class Where {
  kEverywhere,
  /// Layers with keys of their own. Files may carry dead ones for the other layers.
  kOwnKeys,
  /// Layers with values of their own, besides their keys. The same holds for dead ones.
  kOwnValues,
  /// Models with experts.
  kExperts,
  /// Models with an embedding per layer.
  kLayerInputs,
};

/// One tensor, or one per layer: "{i}" in the names stands for the layer's number.
struct TensorRule {
  std::string_view hf;
  std::string_view gguf;
  TensorKind kind = TensorKind::kMatrix;
  RowOrder rows = RowOrder::kSame;
  /// A complete model may lack it (a tied head, biases).
  bool optional = false;
  Where where = Where::kEverywhere;
};

/// The GGUF type of a metadata value; llama.cpp reads keys type-strictly.
enum class ValueType { kU32, kF32, kBool, kString };

/// What to do when the Hugging Face configuration (and `Family::defaults`) has none of a key's spellings.
enum class Absent {
  /// An error naming the first spelling.
  kError,
  /// Leave the GGUF key out.
  kOmit,
  /// Take num_attention_heads.
  kQueryHeads,
  /// Take hidden_size / num_attention_heads.
  kHeadDim,
  /// Take the base of the rotary embedding that the family has when nobody says otherwise.
  kRopeBase,
  /// The same for the layers with a sliding window.
  kSlidingRopeBase,
  /// Take 0.
  kZero,
};

/// When a key is written at all.
enum class Condition {
  kAlways,
  /// Only if the configuration has head_dim (llama.cpp otherwise assumes embedding_length / head_count).
  kExplicitHeadDim,
  /// Only for a model with experts.
  kExperts,
};

/// What a key holds that no single field of the configuration says: something that each layer has. See
/// `LayerShape`.
enum class PerLayer {
  /// The value of the field.
  kNone,
  /// Whether each layer has a sliding window: array of bool.
  kSliding,
  /// The n when every n-th layer lacks the window; left out when it is `Family::full_every`, which llama.cpp
  /// assumes.
  kFullEvery,
  /// Heads of keys and values, and the width of the feed-forward part: one number when all layers agree, else
  /// an array of i32, as gguf-py writes it.
  kKeyHeads,
  kFeedForward,
  /// The size of a head in the layers with all positions.
  kFullHeadDim,
};

/// One configuration value. Read GGUF -> Hugging Face, it goes to the first spelling. (The scaling of the
/// rotary embedding is in `rope.hpp`.)
struct ConfigKey {
  /// Dotted paths from the root of config.json, current spelling first: "rope_parameters.rope_theta",
  /// "rope_theta".
  std::vector<std::string_view> hf;
  /// The whole GGUF key, architecture included: "llama.rope.freq_base".
  std::string gguf;
  ValueType type = ValueType::kU32;
  Absent absent = Absent::kError;
  Condition condition = Condition::kAlways;
  PerLayer per_layer = PerLayer::kNone;
};

/// What llama.cpp takes for granted, so that no key of the file can say otherwise.
enum class Implied {
  /// Absent, null or false.
  kOff,
  /// The attention mask of text is causal: absent, null, false, or "vision", which is for images.
  kCausal,
  /// The square of what queries are divided by: the size of a head, but hidden_size / num_attention_heads in
  /// a model of 62 layers (llama.cpp takes that for Gemma 3 27B).
  kAttentionScalar,
};

/// A field of the configuration with only one value that GGUF can hold.
struct ImpliedKey {
  std::string_view hf;
  Implied value = Implied::kOff;
};

/// By what the decoder multiplies token embeddings.
enum class EmbeddingScale { kOne, kSqrtHidden };

/// By what attention multiplies the products of queries and keys.
enum class AttentionScale {
  kHeadDim,            ///< 1 / sqrt(size of a head)
  kQueryPreAttention,  ///< 1 / sqrt(query_pre_attn_scalar), a field of the configuration
  kOne,
};

/// Which layers attend to all positions and which have a sliding window, when the configuration does not
/// list them.
struct LayerPattern {
  /// Every n-th layer attends to all positions; 0: each of them.
  std::int64_t full_every = 0;
  /// The last layer does, whatever the configuration lists.
  bool ends_full = false;
  /// The size of a head there, unless the configuration says it; 0: as in the other layers.
  std::int64_t full_head_dim = 0;
};

/// Everything that libqat knows of a family.
struct Family {
  /// libqat's own name; also the name of the table's file.
  std::string_view name;
  /// Values of config.json's `model_type`; the first is written. Those of models with more than text are
  /// listed too: their `text_config` describes the decoder.
  std::vector<std::string_view> model_types;
  /// The class in config.json's `architectures`.
  std::string_view hf_class;
  /// `general.architecture`.
  std::string_view gguf_architecture;
  std::vector<TensorRule> tensors;
  std::vector<ConfigKey> config;
  /// Other beginnings of Hugging Face names and what stands for them in `tensors`, the first that fits:
  /// models with more than text put the decoder under another name.
  std::vector<std::pair<std::string_view, std::string_view>> hf_prefixes = {};
  /// Fields (dotted paths) that published files leave out, with the values of the family's configuration
  /// class.
  std::vector<std::pair<std::string_view, ConfigValue>> defaults = {};
  std::vector<ImpliedKey> implied = {};
  /// Fields that say how many rows a GGUF tensor has.
  std::vector<std::pair<std::string_view, std::string_view>> row_counts = {
      {"vocab_size", "token_embd.weight"}};
  /// GGUF tensors and Hugging Face tensors that hold derived values, with no counterpart on the other side: a
  /// loader may pass over `hf_only`; `rope_freqs.weight` holds the divisors of a scaled rotary embedding.
  std::vector<std::string_view> gguf_only;
  std::vector<std::string_view> hf_only;
  /// RMS norms compute x * (norm_offset + w); GGUF stores norm_offset + w.
  double norm_offset = 0.0;
  /// Queries and keys pass an RMS norm per head before the rotary embedding.
  bool qk_norm = false;
  /// Values pass one without a weight.
  bool v_norm = false;
  AttentionScale attention_scale = AttentionScale::kHeadDim;
  EmbeddingScale embedding_scale = EmbeddingScale::kOne;
  /// config.json's field for the activation, which GGUF does not store, and its value.
  std::string_view activation_key = "hidden_act";
  std::string_view activation;
  LayerPattern layers = {};
  /// Rotary embeddings unless the configuration says otherwise. With `sliding_rope` the layers with a window
  /// have one of their own.
  Rope rope = {};
  std::optional<Rope> sliding_rope = {};
  /// The file holds the divisors even when they are all 1.
  bool always_divisors = false;
  /// The file has an embedding row for each token of the tokenizer and none beyond.
  bool cut_embedding = false;
  /// `tokenizer.ggml.model` for the family's BPE over characters, where spaces are "▁" and unknown characters
  /// become bytes; "" when it has none.
  std::string_view character_bpe = "";
  /// Special tokens that programs read in generated text: llama.cpp shall not hide them.
  std::vector<std::string_view> visible_tokens = {};
};

/// Every family, sorted by name.
const std::vector<const Family*>& families();

/// Throws UnsupportedError that lists the known ones.
const Family& find_by_model_type(std::string_view model_type);
/// The same for `general.architecture`.
const Family& find_by_gguf_architecture(std::string_view architecture);

/// A name on the other side, with the rule that led to it.
struct Mapped {
  std::string name;
  const TensorRule* rule = nullptr;
  /// The layer's number, or nothing for a tensor outside the layers.
  std::optional<std::int64_t> layer;
};

/// The name under which `tensors` and `hf_only` list a Hugging Face tensor: without the detours of
/// `hf_prefixes`.
std::string canonical_name(const Family& family, std::string_view hf_name);

/// Nothing when the family has no such tensor. Names include the trailing ".weight" (where the tensor has
/// it) and may begin as `hf_prefixes` says.
std::optional<Mapped> hf_to_gguf(const Family& family, std::string_view hf_name);
/// The reverse of `hf_to_gguf`; gives the canonical name.
std::optional<Mapped> gguf_to_hf(const Family& family, std::string_view gguf_name);

/// Whether `name` is one of `patterns` ("{i}" stands for a number, a trailing "*" for anything): for
/// `gguf_only`, and for `hf_only` with a canonical name.
bool matches_any(const std::vector<std::string_view>& patterns, std::string_view name);

/// For each row of the GGUF tensor the row of the Hugging Face tensor that stands there, `rows` = heads * D:
/// GGUF row h*D + 2j is row h*D + j, GGUF row h*D + 2j + 1 is row h*D + j + D/2 (j < D/2). Whole rows move,
/// so it commutes with every row-wise quantization. ArgumentError unless D is a whole even number. (llama.cpp
/// convert_hf_to_gguf.py, `LlamaModel.permute`)
std::vector<std::int64_t> rope_permutation(std::int64_t rows, std::int64_t heads);

/// The way back: `inverse(p)[p[i]] = i`. ArgumentError unless `permutation` holds 0 .. n-1 once each.
std::vector<std::int64_t> inverse_permutation(const std::vector<std::int64_t>& permutation);

}  // namespace qat::arch
