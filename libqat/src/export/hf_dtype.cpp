#include "export/hf_dtype.hpp"

#include <ATen/ops/equal.h>

#include "qat/core/error.hpp"

namespace qat {
namespace {

constexpr HfDtype kTypes[] = {{"bfloat16", at::kBFloat16, io::Dtype::kBF16},
                              {"float16", at::kHalf, io::Dtype::kF16},
                              {"float32", at::kFloat, io::Dtype::kF32}};

bool holds(const HfDtype& dtype, const at::Tensor& weight) {
  return at::equal(weight.to(dtype.tensor).to(at::kFloat), weight);
}

}  // namespace

const HfDtype& hf_dtype(std::string_view name) {
  for (const HfDtype& dtype : kTypes) {
    if (dtype.name == name) return dtype;
  }
  throw ArgumentError("dtype: expected bfloat16, float16 or float32, got \"" + std::string(name) + "\"");
}

const HfDtype& exact_hf_dtype(const QuantizedCheckpoint& checkpoint) {
  const HfDtype *bf16 = &kTypes[0], *f16 = &kTypes[1], *f32 = &kTypes[2];
  bool in_bf16 = true, in_f16 = true;
  const auto look = [&](const at::Tensor& weight) {
    in_bf16 = in_bf16 && holds(*bf16, weight);
    in_f16 = in_f16 && holds(*f16, weight);
  };
  for (const auto& [key, tensor] : checkpoint.floats) {
    if (is_weight(tensor)) look(tensor.to(at::kFloat));
  }
  for (auto it = checkpoint.quantized.begin(); it != checkpoint.quantized.end() && (in_bf16 || in_f16);
       ++it) {
    look(dequantize_tensor(it->first, it->second));
  }
  return in_bf16 ? *bf16 : in_f16 ? *f16 : *f32;
}

bool is_weight(const at::Tensor& tensor) {
  return tensor.is_floating_point();
}

}  // namespace qat
