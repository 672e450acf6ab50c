#include "qat/export/gguf_model.hpp"

#include <nlohmann/json.hpp>

#include "export/config_lookup.hpp"
#include "export/gguf_config.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

const arch::Family& family_of(const std::string& where, const io::GgufFile& file) {
  try {
    return arch::find_by_gguf_architecture(file.get<std::string>("general.architecture"));
  } catch (const UnsupportedError& error) {
    throw UnsupportedError(where + error.what());
  }
}

arch::ModelShape shape_of(const std::string& where, const arch::Family& family,
                          const nlohmann::json& config) {
  try {
    return arch::read_shape(family, arch::decoder_lookup(family, lookup_in(config)));
  } catch (const ArgumentError& error) {  // of a field that the file's keys led to
    throw FileError(where + error.what());
  }
}

}  // namespace

GgufModel::GgufModel(const std::string& function, const std::string& path)
    : where_(function + ": " + path + ": "),
      file_(std::make_shared<const io::GgufFile>(path)),
      family_(&family_of(where_, *file_)),
      config_(config_of_gguf(where_, *file_, *family_)) {
  const auto config = nlohmann::json::parse(config_);
  const auto query_heads = config.at("num_attention_heads").get<int64_t>();
  const auto key_heads = config.value("num_key_value_heads", query_heads);
  shape_ = shape_of(where_, *family_, config);
  for (const io::GgufTensor& stored : file_->tensors()) {
    if (arch::matches_any(family_->gguf_only, stored.name)) continue;
    const auto mapped = arch::gguf_to_hf(*family_, stored.name);
    const bool dead = mapped && arch::presence(*mapped->rule, shape_, mapped->layer) == arch::Presence::kDead;
    if (!dead) add(stored, query_heads, key_heads);
  }
}

void GgufModel::require_complete() const {
  std::string missing;
  for (const arch::TensorRule& rule : family_->tensors) {
    const std::size_t hole = rule.gguf.find("{i}");
    const bool per_layer = hole != std::string_view::npos;
    for (std::size_t layer = 0; layer < (per_layer ? shape_.layers.size() : 1); ++layer) {
      const auto number = per_layer ? std::optional(static_cast<int64_t>(layer)) : std::nullopt;
      if (arch::presence(rule, shape_, number) != arch::Presence::kRequired) continue;
      std::string name(rule.gguf);
      if (per_layer) name.replace(hole, 3, std::to_string(layer));
      if (file_->find_tensor(name) == nullptr) missing += (missing.empty() ? "" : ", ") + name;
    }
  }
  if (!missing.empty()) {
    throw FileError(where_ + "expected every tensor of a " + std::string(family_->name) +
                    " model, got none for " + missing);
  }
}

void GgufModel::add(const io::GgufTensor& stored, int64_t query_heads, int64_t key_heads) {
  GgufModelTensor tensor{&stored, grid::ggml_type(stored.type), nullptr, 0, 0.0};
  if (tensor.type == nullptr) {
    throw UnsupportedError(where_ + stored.name + ": expected a type that libqat has a grid for, got " +
                           std::string(io::ggml_type_size(stored.type)->name));
  }
  const auto mapped = arch::gguf_to_hf(*family_, stored.name);
  if (mapped) {
    tensor.rule = mapped->rule;
    if (tensor.rule->kind == arch::TensorKind::kNorm) tensor.offset = family_->norm_offset;
    if (tensor.rule->rows == arch::RowOrder::kRopeQueryHeads) tensor.heads = query_heads;
    if (tensor.rule->rows == arch::RowOrder::kRopeKeyHeads) tensor.heads = key_heads;
  }
  if (tensor.heads != 0 && stored.dims.size() == 1 && tensor.type->unpack != nullptr) {
    throw UnsupportedError(where_ + stored.name + ": expected a bias in a float type, got " +
                           std::string(tensor.type->name));
  }
  tensors_[mapped ? mapped->name : stored.name] = tensor;
}

std::vector<int64_t> GgufModel::row_order(const GgufModelTensor& tensor) const {
  if (tensor.heads == 0) return {};
  try {
    return arch::rope_permutation(tensor.stored->shape().front(), tensor.heads);
  } catch (const ArgumentError& error) {
    throw FileError(where_ + tensor.stored->name + ": " + error.what());
  }
}

}  // namespace qat
