#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>

#include "export/comparison.hpp"
#include "export/gguf_plan.hpp"
#include "export/gguf_reader.hpp"
#include "export/input_file.hpp"
#include "export/targets.hpp"
#include "export/tokenizer_metadata.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

constexpr uint32_t kQuantizationVersion = 2;   // ggml.h, GGML_QNT_VERSION
constexpr int64_t kChunk = int64_t{1} << 20U;  // bytes packed between two writes

/// "135M": two digits at least, in the largest unit below the count. (gguf-py, utility.py)
std::string size_label(int64_t parameters) {
  constexpr std::array<std::pair<double, const char*>, 4> kUnits{
      {{1e12, "T"}, {1e9, "B"}, {1e6, "M"}, {1e3, "K"}}};
  const auto count = static_cast<double>(parameters);
  const auto* unit =
      std::find_if(kUnits.begin(), kUnits.end() - 1, [count](auto u) { return count > u.first; });
  const double scaled = count / unit->first;
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), std::round(scaled) < 10 ? "%.1f%s" : "%.0f%s", scaled,
                unit->second);
  return text.data();
}

/// `general.file_type`: the type that holds most weights.
uint32_t file_type(const GgufPlan& plan) {
  std::map<uint32_t, int64_t> weights;
  for (const PlannedTensor& tensor : plan.tensors)
    weights[tensor.type->file_type] += tensor.rows * tensor.width;
  return std::max_element(weights.begin(), weights.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

const std::string& tokenizer_of(const QuantizedCheckpoint& checkpoint, const ExportOptions& options) {
  return options.tokenizer_from.empty() ? checkpoint.tokenizer : options.tokenizer_from;
}

GgufPlan plan_for(const QuantizedCheckpoint& checkpoint, const ExportOptions& options) {
  const bool cut = ModelConfig(checkpoint.config).family().cut_embedding;
  return plan_gguf(checkpoint, cut ? count_tokens(tokenizer_of(checkpoint, options)) : std::nullopt);
}

io::GgufMetadata metadata_of(const GgufPlan& plan, const QuantizedCheckpoint& checkpoint,
                             const ExportOptions& options) {
  int64_t parameters = 0;
  bool quantized = false;
  for (const PlannedTensor& tensor : plan.tensors) {
    parameters += tensor.rows * tensor.width;
    quantized = quantized || !tensor.is_float();
  }
  io::GgufMetadata metadata;
  metadata.set("general.architecture", std::string(plan.config.family().gguf_architecture));
  metadata.set("general.type", std::string("model"));
  const std::string name = options.name.empty() ? plan.config.name() : options.name;
  if (!name.empty()) metadata.set("general.name", name);
  metadata.set("general.size_label", size_label(parameters));
  metadata.set("general.file_type", file_type(plan));
  if (quantized) metadata.set("general.quantization_version", kQuantizationVersion);
  for (const auto& [key, value] : plan.config.gguf_keys()) metadata.set(key, value);

  const std::string& source = tokenizer_of(checkpoint, options);
  for (const auto& [key, value] :
       tokenizer_metadata(source, checkpoint.config, plan.config.family(), plan.config.vocab_size())) {
    metadata.set(key, value);
  }
  return metadata;
}

/// Packs the rows of one tensor.
class RowPacker {
 public:
  explicit RowPacker(const PlannedTensor& tensor)
      : tensor_(tensor), grid_(grid::find(tensor.type->grid)), stored_(scale_count()) {}

  /// Row `row` of the file. Codes and scales that no file could hold are an ArgumentError: packing would turn
  /// them into other numbers.
  void write(int64_t row, uint8_t* bytes) {
    const int64_t source = tensor_.row_in_checkpoint(row);
    if (tensor_.is_float()) {
      const auto size = static_cast<std::size_t>(tensor_.row_bytes());
      std::memcpy(bytes,
                  static_cast<const uint8_t*>(tensor_.values.const_data_ptr()) + source * tensor_.row_bytes(),
                  size);
      return;
    }
    const int8_t* codes = tensor_.codes.const_data_ptr<int8_t>() + source * tensor_.width;
    const float* scales =
        tensor_.scales.const_data_ptr<float>() + source * static_cast<int64_t>(stored_.size());
    check(source, codes, scales);
    tensor_.type->pack(codes, scales, tensor_.width, bytes);
  }

 private:
  std::size_t scale_count() const {
    return tensor_.is_float() ? 0 : static_cast<std::size_t>(tensor_.scales.numel() / tensor_.rows);
  }

  void check(int64_t row, const int8_t* codes, const float* scales) {
    const auto [least, greatest] = std::minmax_element(codes, codes + tensor_.width);
    if (*least < grid_.info().code_min || *greatest > grid_.info().code_max) {
      fail(row, "codes of the grid", std::to_string(*least) + " to " + std::to_string(*greatest));
    }
    const grid::Status status = grid_.store(scales, tensor_.width, stored_.data());
    if (status != grid::Status::kOk ||
        std::memcmp(stored_.data(), scales, stored_.size() * sizeof(float)) != 0) {
      fail(row, "scales as the file stores them", "others");
    }
  }

  [[noreturn]] void fail(int64_t row, const char* expected, const std::string& got) const {
    throw ArgumentError("export_checkpoint: " + tensor_.key + ": row " + std::to_string(row) + ": expected " +
                        expected + " (" + std::string(grid_.info().name) + "), got " + got);
  }

  const PlannedTensor& tensor_;
  const grid::Grid& grid_;
  std::vector<float> stored_;
};

io::ByteProducer producer_of(const PlannedTensor& tensor, const std::function<void(int64_t)>& advance) {
  return [&tensor, &advance](const io::ByteSink& sink) {
    RowPacker packer(tensor);
    const int64_t row_bytes = tensor.row_bytes();
    const int64_t rows_at_once = std::max<int64_t>(1, kChunk / row_bytes);
    std::vector<uint8_t> bytes(static_cast<std::size_t>(std::min(rows_at_once, tensor.rows) * row_bytes));
    for (int64_t first = 0; first < tensor.rows; first += rows_at_once) {
      const int64_t count = std::min(rows_at_once, tensor.rows - first);
      for (int64_t i = 0; i < count; ++i) packer.write(first + i, bytes.data() + i * row_bytes);
      sink(std::as_bytes(std::span(bytes.data(), static_cast<std::size_t>(count * row_bytes))));
      advance(count * row_bytes);
    }
  };
}

void export_gguf(const QuantizedCheckpoint& checkpoint, const std::string& path,
                 const ExportOptions& options) {
  const GgufPlan plan = plan_for(checkpoint, options);
  const io::GgufMetadata metadata = metadata_of(plan, checkpoint, options);
  const int64_t total = plan.bytes();
  int64_t done = 0;
  const std::function<void(int64_t)> advance = [&](int64_t bytes) {
    done += bytes;
    if (options.progress) options.progress(done, total);
  };
  std::vector<io::GgufEntry> entries;
  for (const PlannedTensor& tensor : plan.tensors) {
    entries.push_back({tensor.name,
                       {tensor.shape.rbegin(), tensor.shape.rend()},
                       tensor.type->id,
                       producer_of(tensor, advance)});
  }
  io::write_gguf(path, metadata, entries);
}

ExportPlan planned(const QuantizedCheckpoint& checkpoint, std::string_view /*dtype*/) {
  ExportPlan plan;
  for (const PlannedTensor& tensor : plan_gguf(checkpoint).tensors) {
    plan.tensors.push_back({tensor.name, tensor.key, std::string(tensor.type->name), tensor.shape,
                            tensor.rows * tensor.row_bytes()});
  }
  return plan;
}

std::vector<Obstacle> obstacles(const QuantizedCheckpoint& checkpoint, const ExportOptions&) {
  return gguf_obstacles(checkpoint);
}

}  // namespace

extern const Target kGgufTarget;
constinit const Target kGgufTarget{"gguf",      {},      obstacles,   planned,
                                   export_gguf, is_gguf, verify_gguf, read_gguf};

}  // namespace qat
