#pragma once

// What libqat can write, one row per consumer. A new consumer is one file that defines its row, and the
// row's line in targets.cpp.

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qat/export/export.hpp"
#include "qat/export/plan.hpp"

namespace qat {

/// Which options of ExportOptions mean something for a target, beside those that all share.
struct TargetOptions {
  bool dtype = false;
  bool folder = false;  ///< max_shard_bytes and overwrite
  bool require_exact = false;
};

/// Which static activation scales a target has a place for.
enum class ActivationPlaces { kNone, kLayers, kLayersAndCaches };

struct Target {
  std::string_view name;
  TargetOptions options;
  /// Why the target cannot hold the checkpoint exactly; empty when it can.
  std::vector<Obstacle> (*obstacles)(const QuantizedCheckpoint& checkpoint, const ExportOptions& options);
  /// What `write` would write in that dtype, for a checkpoint with or without numbers.
  ExportPlan (*plan)(const QuantizedCheckpoint& checkpoint, std::string_view dtype);
  /// Writes a checkpoint without obstacles, by atomic rename.
  void (*write)(const QuantizedCheckpoint& checkpoint, const std::string& path, const ExportOptions& options);
  /// Whether what stands at `path` is of this kind. Throws nothing for files that are not.
  bool (*recognizes)(const std::filesystem::path& path);
  std::vector<Difference> (*verify)(const std::string& path, const QuantizedCheckpoint& checkpoint);
  /// Exactly the codes and scales of the file; null when the kind holds none.
  QuantizedCheckpoint (*read)(const std::string& path);
  /// The functions above get checkpoints without the scales that have none.
  ActivationPlaces activations = ActivationPlaces::kNone;
  /// See `cautions` in qat/export/export.hpp; null: none.
  std::vector<Obstacle> (*cautions)(const QuantizedCheckpoint& checkpoint) = nullptr;
};

/// Whether the target has a place for the tensor: activation scales may have none.
bool has_place(const Target& target, const std::string& key);
/// The checkpoint without what has none.
QuantizedCheckpoint placed(const QuantizedCheckpoint& checkpoint, const Target& target);

/// Every target. Those that are recognized by less come after those that are recognized by more.
std::span<const Target* const> targets();

/// ArgumentError that lists the names; `function` begins its message.
const Target& find_target(std::string_view function, std::string_view name);

/// The target whose kind of file or folder stands at `path`, or null.
const Target* target_of(const std::filesystem::path& path);

}  // namespace qat
