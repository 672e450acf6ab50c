#include "qat/export/gguf_model.hpp"

#include <nlohmann/json.hpp>

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

}  // namespace

GgufModel::GgufModel(const std::string& function, const std::string& path)
    : where_(function + ": " + path + ": "),
      file_(std::make_shared<const io::GgufFile>(path)),
      family_(&family_of(where_, *file_)),
      config_(config_of_gguf(where_, *file_, *family_)) {
  const auto config = nlohmann::json::parse(config_);
  const auto query_heads = config.at("num_attention_heads").get<int64_t>();
  const auto key_heads = config.value("num_key_value_heads", query_heads);
  for (const io::GgufTensor& stored : file_->tensors()) {
    if (!arch::matches_any(family_->gguf_only, stored.name)) add(stored, query_heads, key_heads);
  }
}

void GgufModel::add(const io::GgufTensor& stored, int64_t query_heads, int64_t key_heads) {
  GgufModelTensor tensor{&stored, grid::ggml_type(stored.type), nullptr, 0};
  if (tensor.type == nullptr) {
    throw UnsupportedError(where_ + stored.name + ": expected a type that libqat has a grid for, got " +
                           std::string(io::ggml_type_size(stored.type)->name));
  }
  const auto mapped = arch::gguf_to_hf(*family_, stored.name);
  if (mapped) {
    tensor.rule = mapped->rule;
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
