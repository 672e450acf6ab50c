#include "export/gguf_plan.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "export/comparison.hpp"
#include "export/fitting.hpp"
#include "export/gguf_grids.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

constexpr const char* kEmbedding = "token_embd.weight";
constexpr const char* kHead = "output.weight";
/// The place of tensors outside the layers: before them.
constexpr int64_t kOutside = -1;

/// A tensor with the key under which the model knows it (an alias points to the tensor of another key).
struct Source {
  std::string holder;
  const QuantizedTensor* quantized = nullptr;
  const at::Tensor* values = nullptr;
};

using Sources = std::map<std::string, Source>;

[[noreturn]] void fail(const std::string& key, const std::string& expected, const std::string& got) {
  throw ArgumentError("export_checkpoint: " + key + ": expected " + expected + ", got " + got);
}

Sources sources_of(const QuantizedCheckpoint& checkpoint) {
  Sources sources;
  for (const auto& [key, tensor] : checkpoint.quantized) sources[key] = {key, &tensor, nullptr};
  for (const auto& [key, tensor] : checkpoint.floats) sources[key] = {key, nullptr, &tensor};
  for (const auto& [alias, holder] : checkpoint.aliases) {
    const auto found = sources.find(holder);
    if (found == sources.end())
      fail(alias, "an alias of a tensor", "an alias of " + holder + ", which is none");
    sources[alias] = found->second;
  }
  return sources;
}

/// Every tensor that a complete model of this shape has.
void require_complete(const ModelConfig& config,
                      const std::set<std::pair<int64_t, const arch::TensorRule*>>& got) {
  std::string missing;
  for (const arch::TensorRule& rule : config.family().tensors) {
    const std::size_t hole = rule.hf.find("{i}");
    const bool per_layer = hole != std::string_view::npos;
    for (int64_t layer = 0; layer < (per_layer ? config.layers() : 1); ++layer) {
      const auto number = per_layer ? std::optional(layer) : std::nullopt;
      if (arch::presence(rule, config.shape(), number) != arch::Presence::kRequired) continue;
      if (got.contains({number.value_or(kOutside), &rule})) continue;
      std::string key(rule.hf);
      if (per_layer) key.replace(hole, 3, std::to_string(layer));
      missing += (missing.empty() ? "" : ", ") + key;
    }
  }
  if (!missing.empty()) fail("checkpoint", "every tensor of the model", "none for " + missing);
}

/// Everything after dimension 0.
int64_t width_of(const std::vector<int64_t>& shape) {
  int64_t width = 1;
  for (std::size_t i = 1; i < shape.size(); ++i) width *= shape[i];
  return width;
}

/// What codes should be: a row for each of dimension 0, or for each of a stack of matrices.
std::vector<int64_t> rows_and_width(const QuantizedTensor& tensor) {
  const std::vector<int64_t>& shape = tensor.shape;
  const int64_t width = width_of(shape);
  const bool stack = shape.size() == 3 && tensor.codes.dim() == 2 && tensor.codes.size(1) == shape[2];
  return stack ? std::vector<int64_t>{shape[0] * shape[1], shape[2]} : std::vector<int64_t>{shape[0], width};
}

/// On the CPU, contiguous; what has no numbers stays without.
at::Tensor on_cpu(const at::Tensor& tensor) {
  return tensor.is_meta() ? tensor.detach() : tensor.detach().cpu().contiguous();
}

/// `tensor` has been fitted to a grid of GGUF files.
void take_quantized(PlannedTensor& planned, const QuantizedTensor& tensor) {
  planned.type = grid::ggml_type_of_grid(tensor.scheme.weight);
  const grid::Grid& grid = grid::find(tensor.scheme.weight);
  const std::vector<int64_t> codes = rows_and_width(tensor);
  const std::vector<int64_t> scales{codes[0], grid.blocks(codes[1]), grid.params()};
  const bool fits = tensor.codes.sizes() == at::IntArrayRef(codes) && tensor.codes.dtype() == at::kChar &&
                    tensor.scales.sizes() == at::IntArrayRef(scales) && tensor.scales.dtype() == at::kFloat;
  if (!fits) {
    fail(planned.key, "codes int8" + shape_text(codes) + " and scales float32" + shape_text(scales),
         "codes " + shape_text(tensor.codes.sizes().vec()) + " and scales " +
             shape_text(tensor.scales.sizes().vec()) + " or another dtype");
  }
  planned.shape = tensor.shape;
  planned.rows = codes[0];
  planned.width = codes[1];
  planned.codes = on_cpu(tensor.codes);
  planned.scales = on_cpu(tensor.scales);
}

/// llama.cpp wants all but matrices (and embeddings) in float32.
bool is_float32(arch::TensorKind kind) {
  using enum arch::TensorKind;
  return kind == kNorm || kind == kBias || kind == kRouter || kind == kScale;
}

/// Matrices keep their type. `offset` is added to the values.
void take_floats(PlannedTensor& planned, const at::Tensor& tensor, bool float32, double offset) {
  const bool known = tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kHalf ||
                     tensor.scalar_type() == at::kBFloat16;
  if (!known) fail(planned.key, "float32, float16 or bfloat16", std::string(tensor.dtype().name()));
  if (tensor.dim() < 1 || tensor.numel() == 0)
    fail(planned.key, "a tensor with values", shape_text(tensor.sizes().vec()));
  planned.shape = tensor.sizes().vec();
  planned.rows = planned.shape[0];
  planned.width = width_of(planned.shape);
  planned.values = on_cpu(tensor);
  if (float32 || planned.shape.size() == 1) planned.values = planned.values.to(at::kFloat);
  if (offset != 0.0) planned.values = planned.values.add(offset);
  const at::ScalarType type = planned.values.scalar_type();
  planned.type = grid::ggml_type_of_grid(type == at::kFloat ? "f32" : type == at::kHalf ? "f16" : "bf16");
}

PlannedTensor plan_tensor(const ModelConfig& config, const std::string& key, const Source& source,
                          const arch::Mapped& mapped) {
  PlannedTensor planned;
  planned.name = mapped.name;
  planned.key = key;
  const arch::TensorKind kind = mapped.rule->kind;
  if (source.quantized != nullptr) {
    if (is_float32(kind)) {
      throw UnsupportedError("export_checkpoint: " + key + ": expected a float " +
                             std::string(arch::to_string(kind)) + ", got a quantized one");
    }
    take_quantized(planned, *source.quantized);
  } else {
    const bool norm = kind == arch::TensorKind::kNorm;
    take_floats(planned, *source.values, is_float32(kind), norm ? config.family().norm_offset : 0.0);
  }
  if (mapped.rule->rows != arch::RowOrder::kSame) {
    const bool query = mapped.rule->rows == arch::RowOrder::kRopeQueryHeads;
    planned.order = arch::rope_permutation(planned.rows, query ? config.query_heads() : config.key_heads());
  }
  return planned;
}

/// The first `rows` rows.
void cut(PlannedTensor& tensor, int64_t rows) {
  tensor.rows = tensor.shape[0] = rows;
  for (at::Tensor* part : {&tensor.codes, &tensor.scales, &tensor.values}) {
    if (part->defined()) *part = part->narrow(0, 0, rows);
  }
}

/// A row for each token: as many as the configuration says are there, `tokens` of them are written.
void check_vocabulary(const ModelConfig& config, PlannedTensor& tensor, int64_t tokens) {
  if (tensor.rows != config.vocab_size()) {
    fail(tensor.key, std::to_string(config.vocab_size()) + " rows (the configuration's vocab_size)",
         std::to_string(tensor.rows));
  }
  if (tokens < tensor.rows) cut(tensor, tokens);
}

bool has_row_per_token(arch::TensorKind kind) {
  using enum arch::TensorKind;
  return kind == kEmbedding || kind == kLayerEmbedding || kind == kHead;
}

PlannedTensor plan_rope_divisors(const std::vector<float>& divisors) {
  PlannedTensor planned;
  planned.name = planned.key = "rope_freqs.weight";
  planned.type = grid::ggml_type_of_grid("f32");
  planned.rows = static_cast<int64_t>(divisors.size());
  planned.width = 1;
  planned.shape = {planned.rows};
  planned.values = at::empty(planned.shape, at::kFloat);
  std::copy(divisors.begin(), divisors.end(), planned.values.data_ptr<float>());
  return planned;
}

}  // namespace

int64_t GgufPlan::bytes() const noexcept {
  int64_t sum = 0;
  for (const PlannedTensor& tensor : tensors) sum += tensor.rows * tensor.row_bytes();
  return sum;
}

GgufPlan plan_gguf(const QuantizedCheckpoint& original, std::optional<int64_t> tokens) {
  GgufPlan plan{ModelConfig(original.config), {}};
  const auto [checkpoint, obstacles] = fit(original, gguf_grids);
  if (!obstacles.empty()) {
    const Obstacle& first = obstacles.front();
    throw UnsupportedError("export_checkpoint: " + first.tensor + " (" + first.grid + "): " + first.reason);
  }
  const arch::Family& family = plan.config.family();
  const Sources sources = sources_of(checkpoint);

  // Sorted by layer, then by the family's table: the order in which people read a model.
  std::map<std::pair<int64_t, const arch::TensorRule*>, PlannedTensor> sorted;
  std::set<std::pair<int64_t, const arch::TensorRule*>> places;
  std::map<std::string, std::string> holders;
  for (const auto& [key, source] : sources) {
    const auto mapped = arch::hf_to_gguf(family, key);
    if (!mapped && arch::matches_any(family.hf_only, arch::canonical_name(family, key))) continue;
    const auto presence =
        mapped ? arch::presence(*mapped->rule, plan.config.shape(), mapped->layer) : arch::Presence::kAbsent;
    if (presence == arch::Presence::kDead) continue;
    if (presence == arch::Presence::kAbsent) {
      throw UnsupportedError("export_checkpoint: " + key + ": expected a tensor of a " +
                             std::string(family.name) + " model with " +
                             std::to_string(plan.config.layers()) +
                             " layers and this configuration, got one that it does not have");
    }
    const std::pair place{mapped->layer.value_or(kOutside), mapped->rule};
    places.insert(place);
    holders[mapped->name] = source.holder;
    sorted[place] = plan_tensor(plan.config, key, source, *mapped);
  }
  require_complete(plan.config, places);
  const bool tied = holders.contains(kHead) && holders[kHead] == holders[kEmbedding];
  const int64_t rows =
      family.cut_embedding ? tokens.value_or(plan.config.vocab_size()) : plan.config.vocab_size();
  for (auto& [place, tensor] : sorted) {
    if (tied && tensor.name == kHead) continue;
    if (has_row_per_token(place.second->kind)) check_vocabulary(plan.config, tensor, rows);
    plan.tensors.push_back(std::move(tensor));
  }
  if (rows < plan.config.vocab_size()) plan.config.cut_vocabulary(rows);
  const std::vector<float> divisors = plan.config.rope_divisors();
  if (!divisors.empty()) plan.tensors.push_back(plan_rope_divisors(divisors));
  return plan;
}

std::vector<Obstacle> gguf_obstacles(const QuantizedCheckpoint& checkpoint) {
  Fitted fitted = fit(checkpoint, gguf_grids);
  if (!fitted.obstacles.empty()) return fitted.obstacles;
  try {
    plan_gguf(fitted.checkpoint);
  } catch (const UnsupportedError& error) {
    return {{"", "", error.what()}};
  }
  return {};
}

}  // namespace qat
