#include "export/targets.hpp"

#include "export/activation_scales.hpp"
#include "qat/core/error.hpp"

namespace qat {

extern const Target kGgufTarget;
extern const Target kCompressedTensorsTarget;
extern const Target kMlxTarget;
extern const Target kGemmaMobileTarget;
extern const Target kHfTarget;

namespace {

constexpr const Target* kTargets[] = {
    &kGgufTarget, &kCompressedTensorsTarget, &kMlxTarget, &kGemmaMobileTarget, &kHfTarget,
};

}  // namespace

bool has_place(const Target& target, const std::string& key) {
  if (!is_activation_scale(key) || target.activations == ActivationPlaces::kLayersAndCaches) return true;
  return target.activations == ActivationPlaces::kLayers && !is_cache_scale(key);
}

QuantizedCheckpoint placed(const QuantizedCheckpoint& checkpoint, const Target& target) {
  QuantizedCheckpoint result = checkpoint;
  std::erase_if(result.floats, [&](const auto& entry) { return !has_place(target, entry.first); });
  return result;
}

std::span<const Target* const> targets() {
  return kTargets;
}

const Target& find_target(std::string_view function, std::string_view name) {
  std::string names;
  for (const Target* target : kTargets) {
    if (target->name == name) return *target;
    names += (names.empty() ? "" : ", ") + std::string(target->name);
  }
  throw ArgumentError(std::string(function) + ": target: expected one of " + names + ", got \"" +
                      std::string(name) + "\"");
}

const Target* target_of(const std::filesystem::path& path) {
  for (const Target* target : kTargets) {
    if (target->recognizes(path)) return target;
  }
  return nullptr;
}

}  // namespace qat
