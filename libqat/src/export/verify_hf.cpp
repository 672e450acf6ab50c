#include <ATen/ops/empty.h>

#include <cstring>
#include <filesystem>
#include <set>

#include "checkpoint/dtype.hpp"
#include "export/comparison.hpp"
#include "export/hf_plan.hpp"
#include "export/input_file.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {
namespace {

at::Tensor read(const io::SafetensorsTensor& stored, at::ScalarType dtype) {
  at::Tensor values = at::empty(stored.shape, dtype);
  if (!stored.data.empty()) std::memcpy(values.mutable_data_ptr(), stored.data.data(), stored.data.size());
  return values;
}

/// Weights by their bits as float32, which holds every number of the three types. A weight that only the
/// file's type has rounded is a difference of its own kind.
void compare_weights(const HfTensor& tensor, const at::Tensor& exact, const at::Tensor& got,
                     std::vector<Difference>& differences) {
  const at::Tensor rounded = exact.to(got.scalar_type()).to(at::kFloat).contiguous();
  const at::Tensor wide = got.to(at::kFloat).contiguous();
  const int64_t rows = exact.dim() == 0 ? 1 : exact.size(0), width = rows == 0 ? 0 : exact.numel() / rows;
  const auto bytes = [](const at::Tensor& values, int64_t i) {
    return reinterpret_cast<const uint8_t*>(values.const_data_ptr<float>() + i);
  };
  Mismatch other, rounding;
  for (int64_t i = 0; i < exact.numel(); ++i) {
    if (std::memcmp(bytes(exact, i), bytes(wide, i), sizeof(float)) == 0) continue;
    const bool close = std::memcmp(bytes(rounded, i), bytes(wide, i), sizeof(float)) == 0;
    (close ? rounding : other)
        .add(i / width, i % width, text_of(exact.const_data_ptr<float>()[i]),
             text_of(wide.const_data_ptr<float>()[i]));
  }
  report(tensor.key, "values", other, differences);
  report(tensor.key, "rounded", rounding, differences);
}

void compare_others(const HfTensor& tensor, const at::Tensor& exact, const at::Tensor& got,
                    std::vector<Difference>& differences) {
  Mismatch mismatch;
  compare_bits(0, static_cast<const uint8_t*>(exact.const_data_ptr()),
               static_cast<const uint8_t*>(got.const_data_ptr()), exact.numel(),
               static_cast<int64_t>(exact.element_size()), mismatch);
  report(tensor.key, "values", mismatch, differences);
}

}  // namespace

void compare_stored(const QuantizedCheckpoint& checkpoint, const HfTensor& tensor,
                    const io::SafetensorsTensor& stored, std::vector<Difference>& differences) {
  const auto dtype = checkpoint::tensor_dtype(stored.dtype);
  const bool fits = dtype && (tensor.weight ? at::isFloatingType(*dtype) && *dtype != at::kDouble
                                            : *dtype == tensor.stored);
  if (!fits) {
    const std::string wanted = tensor.weight
                                   ? "F32, F16 or BF16"
                                   : std::string(io::to_string(*checkpoint::file_dtype(tensor.stored)));
    differences.push_back(
        {tensor.key, "type", 1, "expected " + wanted + ", got " + std::string(io::to_string(stored.dtype))});
  } else if (stored.shape != tensor.shape) {
    differences.push_back({tensor.key, "shape", 1,
                           "expected " + shape_text(tensor.shape) + ", got " + shape_text(stored.shape)});
  } else if (tensor.weight) {
    compare_weights(tensor, weight_of(checkpoint, tensor.holder).contiguous(), read(stored, *dtype),
                    differences);
  } else {
    compare_others(tensor, checkpoint.floats.at(tensor.holder).cpu().contiguous(), read(stored, *dtype),
                   differences);
  }
}

std::vector<Difference> verify_hf(const std::string& path, const QuantizedCheckpoint& checkpoint) {
  const io::SafetensorsDirectory folder(path);
  const std::string config = read_text(std::filesystem::path(path) / "config.json");
  std::vector<Difference> differences;
  if (!same_model(config, checkpoint.config)) {
    differences.push_back(
        {"config.json", "metadata", 1, "expected the checkpoint's configuration, got another"});
  }
  std::set<std::string> expected;
  for (const HfTensor& tensor : plan_hf(checkpoint)) {
    expected.insert(tensor.key);
    const io::SafetensorsTensor* stored = folder.find(tensor.key);
    if (stored == nullptr) {
      differences.push_back({tensor.key, "missing", 1, "expected a tensor, got none"});
    } else {
      compare_stored(checkpoint, tensor, *stored, differences);
    }
  }
  for (const std::string& name : folder.names()) {
    if (!expected.contains(name))
      differences.push_back({name, "extra", 1, "expected no such tensor, got one"});
  }
  return differences;
}

}  // namespace qat
