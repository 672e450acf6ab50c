#include "export/targets.hpp"

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
