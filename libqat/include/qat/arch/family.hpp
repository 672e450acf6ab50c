#pragma once

// What differs between model families when a model goes from Hugging Face's names to GGUF's and back. One
// table per family, in `src/arch/<family>.cpp`; readers, writers and policies ask the table and know no
// family by name.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace qat::arch {

/// The role of a tensor. Norms and biases are stored as F32 in GGUF; the others can be quantized.
enum class TensorKind { kEmbedding, kMatrix, kNorm, kHead, kBias };

/// "embedding", "matrix", "norm", "head" or "bias".
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

/// One tensor, or one per layer: "{i}" in the names stands for the layer's number.
struct TensorRule {
  std::string_view hf;
  std::string_view gguf;
  TensorKind kind = TensorKind::kMatrix;
  RowOrder rows = RowOrder::kSame;
  /// A complete model may lack it (a tied head, biases).
  bool optional = false;
};

/// The GGUF type of a metadata value; llama.cpp reads keys type-strictly.
enum class ValueType { kU32, kF32, kBool, kString };

/// What to do when the Hugging Face configuration has none of a key's spellings.
enum class Absent {
  /// An error naming the first spelling.
  kError,
  /// Leave the GGUF key out.
  kOmit,
  /// Take num_attention_heads.
  kQueryHeads,
  /// Take hidden_size / num_attention_heads.
  kHeadDim,
  /// Take 10000, the base of the rotary embedding when nobody says otherwise.
  kRopeBase,
};

/// When a key is written at all.
enum class Condition {
  kAlways,
  /// Only if the configuration has head_dim (llama.cpp otherwise assumes embedding_length / head_count).
  kExplicitHeadDim,
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
};

/// By what the decoder multiplies token embeddings.
enum class EmbeddingScale { kOne, kSqrtHidden };

/// Everything that libqat knows of a family.
struct Family {
  /// libqat's own name; also the name of the table's file.
  std::string_view name;
  /// Values of config.json's `model_type`; the first is written.
  std::vector<std::string_view> model_types;
  /// The class in config.json's `architectures`.
  std::string_view hf_class;
  /// `general.architecture`.
  std::string_view gguf_architecture;
  std::vector<TensorRule> tensors;
  std::vector<ConfigKey> config;
  /// GGUF tensors and Hugging Face tensors that hold derived values, with no counterpart on the other side: a
  /// loader may pass over `hf_only`; `rope_freqs.weight` holds the divisors of a scaled rotary embedding.
  std::vector<std::string_view> gguf_only;
  std::vector<std::string_view> hf_only;
  /// RMS norms compute x * (norm_offset + w); GGUF stores norm_offset + w.
  double norm_offset = 0.0;
  /// Queries and keys pass an RMS norm per head before the rotary embedding.
  bool qk_norm = false;
  EmbeddingScale embedding_scale = EmbeddingScale::kOne;
  /// config.json's `hidden_act`, which GGUF does not store.
  std::string_view activation;
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

/// Nothing when the family has no such tensor. Names include the trailing ".weight".
std::optional<Mapped> hf_to_gguf(const Family& family, std::string_view hf_name);
/// The reverse of `hf_to_gguf`.
std::optional<Mapped> gguf_to_hf(const Family& family, std::string_view gguf_name);

/// Whether `name` is one of `patterns` ("{i}" stands for a number): for `gguf_only` and `hf_only`.
bool matches_any(const std::vector<std::string_view>& patterns, std::string_view name);

/// For each row of the GGUF tensor the row of the Hugging Face tensor that stands there, `rows` = heads * D:
/// GGUF row h*D + 2j is row h*D + j, GGUF row h*D + 2j + 1 is row h*D + j + D/2 (j < D/2). Whole rows move,
/// so it commutes with every row-wise quantization. ArgumentError unless D is a whole even number. (llama.cpp
/// convert_hf_to_gguf.py, `LlamaModel.permute`)
std::vector<std::int64_t> rope_permutation(std::int64_t rows, std::int64_t heads);

/// The way back: `inverse(p)[p[i]] = i`. ArgumentError unless `permutation` holds 0 .. n-1 once each.
std::vector<std::int64_t> inverse_permutation(const std::vector<std::int64_t>& permutation);

}  // namespace qat::arch
