#pragma once

// The vocabulary of a Hugging Face tokenizer.json, in the form that GGUF files hold: byte-level BPE whose way
// of splitting text llama.cpp knows under a name (llama-bpe, qwen2, smollm, gpt-2), and the BPE over
// characters of families that have one (Gemma).

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "qat/arch/family.hpp"

namespace qat {

/// `tokenizer.ggml.token_type` (llama.h, llama_token_type).
enum TokenType : int32_t {
  kNormalToken = 1,
  kUnknownToken = 2,
  kControlToken = 3,
  kUserDefinedToken = 4,
  kUnusedToken = 5,
  kByteToken = 6,
};

struct Vocabulary {
  std::string model = "gpt2";       ///< `tokenizer.ggml.model`
  std::string pre;                  ///< `tokenizer.ggml.pre`; "" where the model says it
  std::vector<std::string> tokens;  ///< in id order; ids that the tokenizer lacks are "[PAD<id>]", unused
  std::vector<int32_t> types;       ///< TokenType of each token
  std::vector<std::string> merges;  ///< "a b", in rank order; empty where scores say the same
  std::vector<float> scores;        ///< of each token; empty for byte-level BPE
  std::unordered_map<std::string, uint32_t> ids;  ///< token -> id, without the fillers
};

/// `root` is the parsed tokenizer.json of `path`, of a model of `family`. The result has `vocab_size` tokens,
/// one per row of the model's embedding. UnsupportedError (offering --tokenizer-from) for tokenizers of
/// another kind, ArgumentError when the tokenizer has ids beyond the model's vocabulary, FileError for
/// malformed ones.
Vocabulary read_vocabulary(const nlohmann::json& root, const std::filesystem::path& path,
                           const arch::Family& family, int64_t vocab_size);

/// The greatest token id of the tokenizer.json and 1. FileError for malformed ones.
int64_t hf_token_count(const std::filesystem::path& path);

}  // namespace qat
