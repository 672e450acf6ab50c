#include "export/tokenizer_metadata.hpp"

#include <algorithm>
#include <iterator>

#include "export/hf_vocabulary.hpp"
#include "export/input_file.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using std::filesystem::path;

constexpr std::string_view kPrefixes[] = {"tokenizer.", "general.sampling."};
constexpr const char* kTokens = "tokenizer.ggml.tokens";

int64_t token_count(const io::GgufFile& file) {
  return static_cast<int64_t>(file.get<std::vector<std::string>>(kTokens).size());
}

io::GgufMetadata copy_from_gguf(const path& source, int64_t vocab_size) {
  const io::GgufFile file(source);
  const int64_t tokens = token_count(file);
  if (tokens != vocab_size) {
    throw ArgumentError("export_checkpoint: tokenizer_from: " + source.string() + ": expected " +
                        std::to_string(vocab_size) + " tokens, one per row of the model's embedding, got " +
                        std::to_string(tokens));
  }
  io::GgufMetadata copied;
  for (const auto& [key, value] : file.metadata()) {
    const bool wanted = std::any_of(std::begin(kPrefixes), std::end(kPrefixes),
                                    [&](std::string_view prefix) { return key.starts_with(prefix); });
    if (wanted) copied.set(key, value);
  }
  return copied;
}

/// The GGUF or tokenizer.json of a source that is neither "" nor "none".
path file_of(const std::string& source) {
  const bool directory = std::filesystem::is_directory(source);
  const path file = directory ? path(source) / "tokenizer.json" : path(source);
  if (std::filesystem::is_regular_file(file)) return file;
  throw FileError("export_checkpoint: tokenizer_from: expected a GGUF or a tokenizer.json" +
                  std::string(directory ? " in the directory" : "") + ", got no file at " + file.string() +
                  "; name another with tokenizer_from (--tokenizer-from FILE)");
}

}  // namespace

std::optional<int64_t> count_tokens(const std::string& source) {
  if (source.empty() || source == "none") return std::nullopt;
  const path file = file_of(source);
  return is_gguf(file) ? token_count(io::GgufFile(file)) : hf_token_count(file);
}

io::GgufMetadata tokenizer_metadata(const std::string& source, const std::string& config,
                                    const arch::Family& family, int64_t vocab_size) {
  if (source.empty()) {
    throw ArgumentError(
        "export_checkpoint: tokenizer_from: expected a GGUF, a tokenizer.json, a Hugging Face directory or "
        "\"none\" (--tokenizer-from FILE), got nothing, and the checkpoint names no tokenizer");
  }
  if (source == "none") {
    io::GgufMetadata none;
    none.set("tokenizer.ggml.model", std::string("none"));
    return none;
  }
  const path file = file_of(source);
  return is_gguf(file) ? copy_from_gguf(file, vocab_size)
                       : hf_tokenizer_metadata(file, config, family, vocab_size);
}

}  // namespace qat
