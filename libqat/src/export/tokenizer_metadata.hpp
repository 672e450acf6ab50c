#pragma once

// The keys `tokenizer.*` and `general.sampling.*` of a GGUF file, from wherever the tokenizer is.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "qat/arch/family.hpp"
#include "qat/io/gguf.hpp"

namespace qat {

/// `source`: a GGUF (its keys are copied unchanged), a tokenizer.json or a directory that holds one, or
/// "none" (a file without vocabulary). `config`: the model's configuration, for special ids that the
/// tokenizer's own files do not name. `family`: the model's. `vocab_size`: rows of the embedding; every token
/// list has that length. ArgumentError for "" (naming the option) and for lists of another length, FileError
/// for missing and malformed files, UnsupportedError for kinds of tokenizer that are not known.
io::GgufMetadata tokenizer_metadata(const std::string& source, const std::string& config,
                                    const arch::Family& family, int64_t vocab_size);

/// How many tokens a tokenizer of `source` has; nothing for "" and "none". Errors: as `tokenizer_metadata`.
std::optional<int64_t> count_tokens(const std::string& source);

/// The part for tokenizer.json (`path`) and the files beside it.
io::GgufMetadata hf_tokenizer_metadata(const std::filesystem::path& path, const std::string& config,
                                       const arch::Family& family, int64_t vocab_size);

}  // namespace qat
