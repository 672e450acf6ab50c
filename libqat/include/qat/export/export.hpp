#pragma once

// One writer per consumer. Writers pack codes and scales; none of them quantizes or rounds. (The folder is
// called export, which no namespace may be: everything here is in qat.)

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

struct ExportOptions {
  /// Where tokenizer metadata comes from: a GGUF, a tokenizer.json, or an HF directory. "none" writes a file
  /// without vocabulary, for programs that take token ids and give logits (llama.cpp loads it, but its server
  /// needs a vocabulary). "" = the checkpoint's reference.
  std::string tokenizer_from;
  std::string name;  ///< `general.name`; "" = taken from the configuration or left out
  /// Called with bytes written and in all.
  std::function<void(int64_t done, int64_t total)> progress;
};

/// "gguf".
std::vector<std::string_view> export_targets();

/// Writes `path` by atomic rename: the same checkpoint gives the same bytes. ArgumentError for an unknown
/// target or a missing tokenizer (naming the option), UnsupportedError for what the target cannot hold
/// (naming the tensor), FileError for the disk.
void export_checkpoint(const QuantizedCheckpoint& checkpoint, const std::string& path,
                       std::string_view target = "gguf", const ExportOptions& options = {});

/// One difference between a file and the checkpoint it should hold.
struct Difference {
  std::string tensor;  ///< state_dict key; the file's name for "extra", the metadata key for "metadata"
  std::string
      what;       ///< "codes", "scales", "values", "missing", "extra", "type", "shape", "alias", "metadata"
  int64_t count;  ///< how many differ
  std::string first;  ///< the first difference in words
};

/// Reads a GGUF or a checkpoint file back by its consumer's decoding rule and compares it bit for bit: every
/// tensor, and the configuration in the metadata. Empty when nothing differs. FileError for a malformed file,
/// and the errors of export_checkpoint for a checkpoint that the format cannot hold.
std::vector<Difference> verify(const std::string& path, const QuantizedCheckpoint& checkpoint);

}  // namespace qat
