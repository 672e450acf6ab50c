#include "qat/export/export.hpp"

#include "export/gguf_writer.hpp"
#include "export/hf_writer.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

struct Target {
  std::string_view name;
  void (*write)(const QuantizedCheckpoint& checkpoint, const std::string& path, const ExportOptions& options);
};

constexpr Target kTargets[] = {{"gguf", export_gguf}, {"hf", export_hf}};

/// Options that only folders have; elsewhere they would be ignored without a word.
void refuse_options_of_hf(std::string_view target, const ExportOptions& options) {
  const char* set = !options.dtype.empty()         ? "dtype"
                    : options.max_shard_bytes != 0 ? "max_shard_bytes"
                    : options.require_exact        ? "require_exact"
                    : options.overwrite            ? "overwrite"
                                                   : nullptr;
  if (set == nullptr || target == "hf") return;
  throw ArgumentError(std::string("export_checkpoint: ") + set +
                      ": expected it with the target \"hf\" only, got \"" + std::string(target) + "\"");
}

}  // namespace

std::vector<std::string_view> export_targets() {
  std::vector<std::string_view> names;
  for (const Target& target : kTargets) names.push_back(target.name);
  return names;
}

void export_checkpoint(const QuantizedCheckpoint& checkpoint, const std::string& path,
                       std::string_view target, const ExportOptions& options) {
  for (const Target& known : kTargets) {
    if (known.name != target) continue;
    refuse_options_of_hf(target, options);
    return known.write(checkpoint, path, options);
  }
  std::string names;
  for (const Target& known : kTargets) names += (names.empty() ? "" : ", ") + std::string(known.name);
  throw ArgumentError("export_checkpoint: target: expected one of " + names + ", got \"" +
                      std::string(target) + "\"");
}

}  // namespace qat
