#pragma once

// The vocabulary of a Hugging Face tokenizer.json, in the form that GGUF files hold. Only byte-level BPE
// whose way of splitting text llama.cpp knows under a name: llama-bpe, qwen2, smollm, gpt-2.

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <unordered_map>
#include <vector>

namespace qat {

/// `tokenizer.ggml.token_type` (llama.h, llama_token_type).
enum TokenType : int32_t { kNormalToken = 1, kControlToken = 3, kUserDefinedToken = 4, kUnusedToken = 5 };

struct Vocabulary {
  std::string pre;                  ///< `tokenizer.ggml.pre`
  std::vector<std::string> tokens;  ///< in id order; ids that the tokenizer lacks are "[PAD<id>]", unused
  std::vector<int32_t> types;       ///< TokenType of each token
  std::vector<std::string> merges;  ///< "a b", in rank order
  std::unordered_map<std::string, uint32_t> ids;  ///< token -> id, without the fillers
};

/// `root` is the parsed tokenizer.json of `path`. The result has `vocab_size` tokens, one per row of the
/// model's embedding. UnsupportedError (offering --tokenizer-from) for tokenizers of another kind,
/// ArgumentError when the tokenizer has ids beyond the model's vocabulary, FileError for malformed ones.
Vocabulary read_vocabulary(const nlohmann::json& root, const std::filesystem::path& path, int64_t vocab_size);

}  // namespace qat
