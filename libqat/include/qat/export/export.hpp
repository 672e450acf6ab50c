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

/// What a writer may be told besides checkpoint, path and target.
struct ExportOptions {
  /// Where the tokenizer comes from. Target "gguf": a GGUF, a tokenizer.json, or an HF directory. Target
  /// "hf": an HF directory, or a tokenizer.json with the files beside it; they are copied. "none" writes no
  /// tokenizer (llama.cpp loads such a GGUF, but its server needs a vocabulary). "" = the checkpoint's
  /// reference.
  std::string tokenizer_from;
  std::string name;  ///< `general.name` of a GGUF; "" = taken from the configuration or left out
  /// Called with bytes written and in all.
  std::function<void(int64_t done, int64_t total)> progress;

  // The rest is for the targets named; ArgumentError when set for another.
  /// "hf", "compressed-tensors", "gemma-mobile": the model's, "bfloat16", "float16" or "float32"; "" = the
  /// narrowest that holds every number exactly.
  std::string dtype;
  /// Folders: the weights are split into files of at most this many bytes; 0 = 50 GB, as transformers does.
  int64_t max_shard_bytes = 0;
  /// "hf": refuse, listing the tensors, unless quantizing the written weights by each grid's own rule gives
  /// back the checkpoint's codes and scales (see requantization.hpp).
  bool require_exact = false;
  /// Folders: replace one that an earlier export wrote and that holds nothing else.
  bool overwrite = false;
};

/// "gguf", "hf".
std::vector<std::string_view> export_targets();

/// Why a target cannot hold a tensor exactly.
struct Obstacle {
  std::string tensor;  ///< state_dict key; "" when it is the model that has no place in the format
  std::string grid;
  std::string reason;  ///< in words
};

/// Whether `target` can hold the checkpoint with exactly its numbers: empty when it can, else every tensor in
/// the way. ArgumentError for an unknown target and for a checkpoint that is incomplete.
std::vector<Obstacle> can_export(const QuantizedCheckpoint& checkpoint, std::string_view target,
                                 const ExportOptions& options = {});

/// Static activation scales (state_dict keys) that `target` has no place for, so that its files lack them:
/// what the consumer does with activations is then its own affair. ArgumentError for an unknown target.
std::vector<std::string> left_out(const QuantizedCheckpoint& checkpoint, std::string_view target);

/// What to know of a file before it is written, by the first tensor that it concerns: tensors that `target`'s
/// format holds exactly and that a consumer, in the version that libqat is tested with, does not open by
/// itself, and experts that stay float because the format has no place for packed ones. They are written all
/// the same. ArgumentError for an unknown target and for a checkpoint that is incomplete.
std::vector<Obstacle> cautions(const QuantizedCheckpoint& checkpoint, std::string_view target);

/// Writes `path` by atomic rename: the same checkpoint gives the same bytes. ArgumentError for an unknown
/// target or a missing tokenizer (naming the option), UnsupportedError for what the target cannot hold
/// (naming the tensors, as can_export does), FileError for the disk.
///
/// Target "hf": `path` is a folder with config.json, the dequantized weights as safetensors, the tokenizer's
/// files and generation_config.json, a README.md, and libqat.json, which says what requantizing the weights
/// gives. transformers loads it like any model; nothing may stand at `path` but an empty folder (see
/// `overwrite`).
void export_checkpoint(const QuantizedCheckpoint& checkpoint, const std::string& path,
                       std::string_view target = "gguf", const ExportOptions& options = {});

/// Reads a file that a target wrote, or a checkpoint file: exactly its codes and scales, the configuration,
/// and the tokenizer that it holds. UnsupportedError for kinds that hold no codes or cannot be read back,
/// FileError naming file and tensor for malformed ones.
QuantizedCheckpoint import_checkpoint(const std::string& path);

/// One difference between a file and the checkpoint it should hold.
struct Difference {
  std::string tensor;  ///< state_dict key; the file's name for "extra", the metadata key for "metadata"
  /// "codes", "scales", "values", "rounded" (nothing but rounding to the file's float type), "missing",
  /// "extra", "type", "shape", "alias", "metadata"
  std::string what;
  int64_t count;      ///< how many differ
  std::string first;  ///< the first difference in words
};

/// Reads an exported file or folder, or a checkpoint file, back by its consumer's decoding rule and compares
/// it bit for bit: every tensor, and the configuration in the metadata. Empty when nothing differs. FileError
/// for a malformed file, and the errors of export_checkpoint for a checkpoint that the format cannot hold.
std::vector<Difference> verify(const std::string& path, const QuantizedCheckpoint& checkpoint);

}  // namespace qat
