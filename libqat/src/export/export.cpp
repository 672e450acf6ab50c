#include "qat/export/export.hpp"

#include <algorithm>

#include "export/activation_scales.hpp"
#include "export/comparison.hpp"
#include "export/targets.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

/// Options of other targets would be ignored without a word.
void refuse_foreign_options(std::string_view function, const Target& target, const ExportOptions& options) {
  const auto refuse = [&](const char* name, bool set, auto accepts) {
    if (!set || accepts(target.options)) return;
    std::string names;
    for (const Target* other : targets()) {
      if (accepts(other->options)) names += (names.empty() ? "" : ", ") + std::string(other->name);
    }
    throw ArgumentError(std::string(function) + ": " + name + ": expected it with the targets " + names +
                        " only, got \"" + std::string(target.name) + "\"");
  };
  const auto folder = [](const TargetOptions& known) { return known.folder; };
  refuse("dtype", !options.dtype.empty(), [](const TargetOptions& known) { return known.dtype; });
  refuse("max_shard_bytes", options.max_shard_bytes != 0, folder);
  refuse("require_exact", options.require_exact,
         [](const TargetOptions& known) { return known.require_exact; });
  refuse("overwrite", options.overwrite, folder);
}

[[noreturn]] void refuse(const Target& target, const std::vector<Obstacle>& obstacles) {
  constexpr std::size_t kListed = 8;  // a message for people
  if (obstacles.front().tensor.empty()) throw UnsupportedError(obstacles.front().reason);
  std::string list;
  for (std::size_t i = 0; i < std::min(kListed, obstacles.size()); ++i) {
    const Obstacle& obstacle = obstacles[i];
    list += (i == 0 ? "" : "; ") + obstacle.tensor + " (" + obstacle.grid + "): " + obstacle.reason;
  }
  if (obstacles.size() > kListed) {
    list += "; and " + std::to_string(obstacles.size() - kListed) + " more, which can_export lists";
  }
  throw UnsupportedError("export_checkpoint: target \"" + std::string(target.name) +
                         "\": expected tensors that it holds exactly, got others: " + list);
}

}  // namespace

std::vector<std::string_view> export_targets() {
  std::vector<std::string_view> names;
  for (const Target* target : targets()) names.push_back(target->name);
  return names;
}

std::vector<Obstacle> can_export(const QuantizedCheckpoint& checkpoint, std::string_view target,
                                 const ExportOptions& options) {
  const Target& known = find_target("can_export", target);
  refuse_foreign_options("can_export", known, options);
  return known.obstacles(placed(checkpoint, known), options);
}

std::vector<std::string> left_out(const QuantizedCheckpoint& checkpoint, std::string_view target) {
  const Target& known = find_target("left_out", target);
  std::vector<std::string> keys;
  for (const auto& [key, tensor] : checkpoint.floats) {
    if (!has_place(known, key)) keys.push_back(key);
  }
  return keys;
}

std::vector<Obstacle> cautions(const QuantizedCheckpoint& checkpoint, std::string_view target) {
  const Target& known = find_target("cautions", target);
  return known.cautions == nullptr ? std::vector<Obstacle>{} : known.cautions(placed(checkpoint, known));
}

void export_checkpoint(const QuantizedCheckpoint& checkpoint, const std::string& path,
                       std::string_view target, const ExportOptions& options) {
  const Target& known = find_target("export_checkpoint", target);
  refuse_foreign_options("export_checkpoint", known, options);
  const QuantizedCheckpoint written = placed(checkpoint, known);
  const std::vector<Obstacle> obstacles = known.obstacles(written, options);
  if (!obstacles.empty()) refuse(known, obstacles);
  known.write(written, path, options);
}

QuantizedCheckpoint import_checkpoint(const std::string& path) {
  const Target* known = target_of(path);
  if (known == nullptr) return load(path);
  if (known->read != nullptr) return known->read(path);
  throw UnsupportedError("import_checkpoint: " + path +
                         ": expected a file that holds codes and scales, got one of the kind \"" +
                         std::string(known->name) + "\", which cannot be read back");
}

std::vector<Difference> verify(const std::string& path, const QuantizedCheckpoint& checkpoint) {
  const Target* known = target_of(path);
  return known == nullptr ? verify_checkpoint(path, checkpoint)
                          : known->verify(path, placed(checkpoint, *known));
}

}  // namespace qat
