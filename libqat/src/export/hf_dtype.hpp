#pragma once

// The float types of a Hugging Face folder.

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {

/// One float type under its three names.
struct HfDtype {
  std::string_view name;  ///< of config.json: "float32", "float16", "bfloat16"
  at::ScalarType tensor;
  io::Dtype file;
};

/// ArgumentError that lists the names.
const HfDtype& hf_dtype(std::string_view name);

/// The narrowest type that holds every weight of the checkpoint exactly: bfloat16, else float16, else
/// float32.
const HfDtype& exact_hf_dtype(const QuantizedCheckpoint& checkpoint);

/// Whether the tensor is written in the folder's float type; integers and bools keep their own.
bool is_weight(const at::Tensor& tensor);

}  // namespace qat
