#include "qat/arch/family.hpp"

#include <algorithm>
#include <charconv>

#include "arch/families.hpp"
#include "qat/core/error.hpp"

namespace qat::arch {
namespace {

constexpr std::string_view kLayer = "{i}";

/// "0", "17", but not "", "01" or "1x".
std::optional<std::int64_t> layer_number(std::string_view text) {
  std::int64_t number = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const bool plain = error == std::errc() && end == text.data() + text.size() && number >= 0;
  if (!plain || (text.size() > 1 && text.front() == '0')) return std::nullopt;
  return number;
}

struct Match {
  std::optional<std::int64_t> layer;
};

std::optional<Match> match(std::string_view pattern, std::string_view name) {
  if (pattern.ends_with('*')) {
    pattern.remove_suffix(1);
    return name.starts_with(pattern) ? std::optional(Match{}) : std::nullopt;
  }
  const auto hole = pattern.find(kLayer);
  if (hole == std::string_view::npos) return name == pattern ? std::optional(Match{}) : std::nullopt;
  const auto before = pattern.substr(0, hole);
  const auto after = pattern.substr(hole + kLayer.size());
  if (name.size() <= before.size() + after.size() || !name.starts_with(before) || !name.ends_with(after)) {
    return std::nullopt;
  }
  const auto layer = layer_number(name.substr(hole, name.size() - before.size() - after.size()));
  return layer ? std::optional(Match{layer}) : std::nullopt;
}

std::string fill(std::string_view pattern, std::optional<std::int64_t> layer) {
  std::string name(pattern);
  const auto hole = name.find(kLayer);
  if (hole != std::string::npos && layer) name.replace(hole, kLayer.size(), std::to_string(*layer));
  return name;
}

std::optional<Mapped> map_name(const Family& family, std::string_view name,
                               std::string_view TensorRule::* from, std::string_view TensorRule::* to) {
  for (const TensorRule& rule : family.tensors) {
    if (const auto found = match(rule.*from, name))
      return Mapped{fill(rule.*to, found->layer), &rule, found->layer};
  }
  return std::nullopt;
}

[[noreturn]] void fail_unknown(const char* what, std::string_view got,
                               const std::vector<std::string_view>& known) {
  std::string list;
  for (const std::string_view name : known) list += (list.empty() ? "" : ", ") + std::string(name);
  throw UnsupportedError(std::string(what) + ": expected one of " + list + ", got \"" + std::string(got) +
                         "\"");
}

}  // namespace

std::string_view to_string(TensorKind kind) noexcept {
  switch (kind) {
    case TensorKind::kEmbedding:
      return "embedding";
    case TensorKind::kMatrix:
      return "matrix";
    case TensorKind::kNorm:
      return "norm";
    case TensorKind::kHead:
      return "head";
    case TensorKind::kBias:
      return "bias";
    case TensorKind::kLayerEmbedding:
      return "layer_embedding";
    case TensorKind::kRouter:
      return "router";
    case TensorKind::kScale:
      return "scale";
  }
  return "?";
}

const std::vector<const Family*>& families() {
  static const std::vector<const Family*> all{&gemma3(), &gemma4(), &llama(), &qwen2(), &qwen3()};
  return all;
}

const Family& find_by_model_type(std::string_view model_type) {
  std::vector<std::string_view> known;
  for (const Family* family : families()) {
    for (const std::string_view name : family->model_types) {
      if (name == model_type) return *family;
      known.push_back(name);
    }
  }
  fail_unknown("model_type", model_type, known);
}

const Family& find_by_gguf_architecture(std::string_view architecture) {
  std::vector<std::string_view> known;
  for (const Family* family : families()) {
    if (family->gguf_architecture == architecture) return *family;
    known.push_back(family->gguf_architecture);
  }
  fail_unknown("general.architecture", architecture, known);
}

std::string canonical_name(const Family& family, std::string_view hf_name) {
  for (const auto& [prefix, canonical] : family.hf_prefixes) {
    if (hf_name.starts_with(prefix)) {
      return std::string(canonical).append(hf_name.substr(prefix.size()));
    }
  }
  return std::string(hf_name);
}

std::optional<Mapped> hf_to_gguf(const Family& family, std::string_view hf_name) {
  return map_name(family, canonical_name(family, hf_name), &TensorRule::hf, &TensorRule::gguf);
}

std::optional<Mapped> gguf_to_hf(const Family& family, std::string_view gguf_name) {
  return map_name(family, gguf_name, &TensorRule::gguf, &TensorRule::hf);
}

bool matches_any(const std::vector<std::string_view>& patterns, std::string_view name) {
  return std::any_of(patterns.begin(), patterns.end(),
                     [name](std::string_view pattern) { return match(pattern, name).has_value(); });
}

std::vector<std::int64_t> rope_permutation(std::int64_t rows, std::int64_t heads) {
  if (heads <= 0 || rows < 0 || rows % heads != 0 || rows / heads % 2 != 0) {
    throw ArgumentError("rope_permutation: expected rows that " + std::to_string(heads) +
                        " heads share in even parts, got " + std::to_string(rows));
  }
  const std::int64_t head_dim = rows / heads;
  const std::int64_t half = head_dim / 2;
  std::vector<std::int64_t> source(static_cast<std::size_t>(rows));
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t within = row % head_dim;
    source[static_cast<std::size_t>(row)] = row - within + within / 2 + (within % 2) * half;
  }
  return source;
}

std::vector<std::int64_t> inverse_permutation(const std::vector<std::int64_t>& permutation) {
  const auto size = static_cast<std::int64_t>(permutation.size());
  std::vector<std::int64_t> inverse(permutation.size(), -1);
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t target = permutation[static_cast<std::size_t>(i)];
    if (target < 0 || target >= size || inverse[static_cast<std::size_t>(target)] != -1) {
      throw ArgumentError("inverse_permutation: expected the numbers 0 to " + std::to_string(size - 1) +
                          " once each, got " + std::to_string(target) + " at position " + std::to_string(i));
    }
    inverse[static_cast<std::size_t>(target)] = i;
  }
  return inverse;
}

}  // namespace qat::arch
