#pragma once

// The small files of an exported Hugging Face folder: the tokenizer's, taken over, and what libqat says of
// its weights.

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "export/hf_dtype.hpp"
#include "qat/export/requantization.hpp"

namespace qat {

inline constexpr const char* kManifest = "libqat.json";

/// Copies the tokenizer's files, chat templates and generation_config.json that stand in the folder `source`
/// (or beside the tokenizer.json `source`) into `target`. "none" copies nothing. Returns their relative
/// names. ArgumentError for "", FileError for a missing source, UnsupportedError for a GGUF.
std::vector<std::string> copy_tokenizer_files(const std::string& source, const std::filesystem::path& target);

/// What the weights of the folder are.
struct HfWeights {
  const HfDtype* dtype = nullptr;
  std::vector<Requantization> report;
  std::vector<std::string> rounded_floats;  ///< unquantized tensors that the dtype does not hold exactly

  bool is_exact() const;             ///< every number of the checkpoint is in the file
  bool requantizes_exactly() const;  ///< see Requantization::exact
};

/// "requantizing gives the same bytes", or how many blocks of how many tensors change.
std::string requantization_summary(const HfWeights& weights);

/// README.md: what the folder holds, and what to expect when it is quantized again.
std::string hf_readme(const std::string& name, const HfWeights& weights);

/// libqat.json: the same for programs.
nlohmann::ordered_json hf_manifest(const HfWeights& weights);

/// FileError unless `folder` is absent or empty, or an earlier export that holds nothing else (and
/// `overwrite`).
void require_free(const std::filesystem::path& folder, bool overwrite);

}  // namespace qat
