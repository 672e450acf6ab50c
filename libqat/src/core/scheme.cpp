#include "qat/core/scheme.hpp"

#include <array>
#include <utility>

#include "qat/core/error.hpp"

namespace qat {
namespace {

constexpr std::array<std::pair<EstimatorKind, std::string_view>, 4> kEstimators{{
    {EstimatorKind::kSte, "ste"},
    {EstimatorKind::kClippedSte, "clipped_ste"},
    {EstimatorKind::kTrustMask, "trust_mask"},
    {EstimatorKind::kStableQat, "stable_qat"},
}};

constexpr std::array<std::pair<ScaleRule, std::string_view>, 5> kScales{{
    {ScaleRule::kReference, "reference"},
    {ScaleRule::kSearch, "search"},
    {ScaleRule::kDifferentiated, "differentiated"},
    {ScaleRule::kLearned, "learned"},
    {ScaleRule::kSeq, "seq"},
}};

constexpr std::array<std::pair<ScaleGradient, std::string_view>, 3> kScaleGradients{{
    {ScaleGradient::kLsq, "lsq"},
    {ScaleGradient::kTensor, "tensor"},
    {ScaleGradient::kPlain, "plain"},
}};

constexpr std::array<std::pair<SlotKind, std::string_view>, 4> kSlots{{
    {SlotKind::kLinear, "linear"},
    {SlotKind::kEmbedding, "embedding"},
    {SlotKind::kConv, "conv"},
    {SlotKind::kOther, "other"},
}};

template <class Table, class Key>
std::string_view name_of(const Table& table, Key key) noexcept {
  for (const auto& [value, name] : table) {
    if (value == key) return name;
  }
  return "?";
}

template <class Table>
auto value_of(const Table& table, std::string_view wanted, const char* what) {
  std::string legal;
  for (const auto& [value, name] : table) {
    if (name == wanted) return value;
    legal += legal.empty() ? "" : ", ";
    legal += name;
  }
  throw ArgumentError(std::string(what) + ": expected one of " + legal + ", got \"" + std::string(wanted) +
                      "\"");
}

}  // namespace

std::string_view to_string(EstimatorKind kind) noexcept {
  return name_of(kEstimators, kind);
}

EstimatorKind estimator_kind(std::string_view name) {
  return value_of(kEstimators, name, "estimator");
}

std::string_view to_string(ScaleRule rule) noexcept {
  return name_of(kScales, rule);
}

ScaleRule scale_rule(std::string_view name) {
  return value_of(kScales, name, "scale");
}

std::string_view to_string(ScaleGradient rule) noexcept {
  return name_of(kScaleGradients, rule);
}

ScaleGradient scale_gradient(std::string_view name) {
  return value_of(kScaleGradients, name, "scale_gradient");
}

std::string_view to_string(SlotKind kind) noexcept {
  return name_of(kSlots, kind);
}

SlotKind slot_kind(std::string_view name) {
  return value_of(kSlots, name, "kind");
}

}  // namespace qat
