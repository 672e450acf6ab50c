#include <algorithm>
#include <optional>
#include <set>

#include "export/comparison.hpp"
#include "export/gguf_plan.hpp"
#include "qat/arch/family.hpp"
#include "qat/core/error.hpp"
#include "qat/io/gguf.hpp"

namespace qat {
namespace {

const uint8_t* bytes_of(const io::GgufTensor& tensor) {
  return reinterpret_cast<const uint8_t*>(tensor.data.data());
}

std::string text_of(const io::GgufValue* value) {
  if (value == nullptr) return "none";
  return std::visit(
      [value](const auto& held) -> std::string {
        using T = std::decay_t<decltype(held)>;
        if constexpr (std::is_arithmetic_v<T>) return std::to_string(held);
        if constexpr (std::is_same_v<T, std::string>) return held;
        return io::describe_type(*value);
      },
      *value);
}

uint32_t count_of(const io::GgufMetadata& keys, const std::string& key) {
  const io::GgufValue* value = keys.find(key);
  const auto* count = value == nullptr ? nullptr : std::get_if<uint32_t>(value);
  return count == nullptr ? 0 : *count;
}

/// Whether llama.cpp takes the same value when a file lacks the key: the size of a head is that of the
/// embedding divided by the number of heads.
bool is_implied(const std::string& key, const io::GgufMetadata& expected, const arch::Family& family) {
  const auto of_head = [&](const arch::ConfigKey& known) {
    return known.gguf == key && known.condition == arch::Condition::kExplicitHeadDim;
  };
  if (std::none_of(family.config.begin(), family.config.end(), of_head)) return false;
  const std::string prefix = std::string(family.gguf_architecture) + ".";
  const uint32_t heads = count_of(expected, prefix + "attention.head_count");
  return heads > 0 && count_of(expected, key) == count_of(expected, prefix + "embedding_length") / heads;
}

void compare_metadata(const io::GgufFile& file, const ModelConfig& config,
                      std::vector<Difference>& differences) {
  io::GgufMetadata expected = config.gguf_keys();
  expected.set("general.architecture", std::string(config.family().gguf_architecture));
  for (const auto& [key, value] : expected) {
    const io::GgufValue* got = file.metadata().find(key);
    if (got != nullptr ? *got == value : is_implied(key, expected, config.family())) continue;
    differences.push_back({key, "metadata", 1, "expected " + text_of(&value) + ", got " + text_of(got)});
  }
}

/// Walks the file's rows in the checkpoint's order.
void compare_tensor(const PlannedTensor& planned, const io::GgufTensor& stored,
                    std::vector<Difference>& differences) {
  const int64_t row_bytes = planned.row_bytes();
  const std::vector<int64_t> place =
      planned.order.empty() ? planned.order : arch::inverse_permutation(planned.order);
  const auto row_of_file = [&](int64_t row) {
    return bytes_of(stored) + (place.empty() ? row : place[static_cast<std::size_t>(row)]) * row_bytes;
  };
  if (planned.is_float()) {
    Mismatch values;
    const auto* expected = static_cast<const uint8_t*>(planned.values.const_data_ptr());
    for (int64_t row = 0; row < planned.rows; ++row) {
      compare_bits(row, expected + row * row_bytes, row_of_file(row), planned.width, planned.type->bytes,
                   values);
    }
    report(planned.key, "values", values, differences);
    return;
  }
  const int64_t scales_per_row = planned.scales.numel() / planned.rows;
  std::vector<int8_t> codes(static_cast<std::size_t>(planned.width));
  std::vector<float> scales(static_cast<std::size_t>(scales_per_row));
  GridComparison comparison(grid::find(planned.type->grid), planned.width);
  for (int64_t row = 0; row < planned.rows; ++row) {
    planned.type->unpack(row_of_file(row), planned.width, codes.data(), scales.data());
    comparison.add_row(row, planned.codes.const_data_ptr<int8_t>() + row * planned.width,
                       planned.scales.const_data_ptr<float>() + row * scales_per_row, codes.data(),
                       scales.data());
  }
  comparison.report(planned.key, differences);
}

/// How many tokens the file's tokenizer has; nothing when it has none.
std::optional<int64_t> tokens_of(const io::GgufFile& file) {
  const io::GgufValue* value = file.metadata().find("tokenizer.ggml.tokens");
  const auto* tokens = value == nullptr ? nullptr : std::get_if<std::vector<std::string>>(value);
  if (tokens == nullptr || tokens->empty()) return std::nullopt;
  return static_cast<int64_t>(tokens->size());
}

std::string type_name(uint32_t id) {
  return std::string(io::ggml_type_size(id)->name);
}

}  // namespace

std::vector<Difference> verify_gguf(const std::string& path, const QuantizedCheckpoint& checkpoint) {
  const io::GgufFile file(path);
  const GgufPlan plan = plan_gguf(checkpoint, tokens_of(file));
  std::vector<Difference> differences;
  compare_metadata(file, plan.config, differences);
  std::set<std::string_view> expected;
  for (const PlannedTensor& planned : plan.tensors) {
    expected.insert(planned.name);
    const io::GgufTensor* stored = file.find_tensor(planned.name);
    if (stored == nullptr) {
      differences.push_back({planned.key, "missing", 1, "expected a tensor " + planned.name + ", got none"});
    } else if (stored->type != planned.type->id) {
      differences.push_back(
          {planned.key, "type", 1,
           "expected " + std::string(planned.type->name) + ", got " + type_name(stored->type)});
    } else if (stored->shape() != planned.shape) {
      differences.push_back(
          {planned.key, "shape", 1,
           "expected " + shape_text(planned.shape) + ", got " + shape_text(stored->shape())});
    } else {
      compare_tensor(planned, *stored, differences);
    }
  }
  for (const io::GgufTensor& stored : file.tensors()) {
    if (expected.contains(stored.name)) continue;
    differences.push_back({stored.name, "extra", 1, "expected no such tensor, got one"});
  }
  return differences;
}

}  // namespace qat
