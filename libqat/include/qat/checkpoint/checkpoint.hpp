#pragma once

// QuantizedCheckpoint: what ships. Codes, scales and Scheme per quantized tensor, all other tensors as they
// are, the model's configuration, and where its tokenizer is. No latents, no optimizer, no estimator.
//
// File `*.qat.safetensors`, format "1":
//   1. `<key>.codes` U8 [R, packed_bytes(N)], laid out by grid/pack.hpp, unused bits 0. R is the product
//      of the shape's first dimensions: the first alone, or two of them for a stack of matrices, [E, O, I]
//      with rows of I. (A stack on a grid in blocks may also have E rows of O * I.)
//   2. `<key>.<field>` for each stored scale field of the grid, in the field's own type (F16, F32, ...),
//      [R, G], or [R, G, count] where a block has several of that name.
//   3. Unquantized tensors under their own key.
//   4. Metadata `libqat.format` ("1"), `libqat.tensors` (JSON: key -> {"weight": grid, "shape": [...]}),
//      `libqat.aliases` (JSON: key -> key), `libqat.config`, `libqat.tokenizer`, `libqat.policy`.
// Keys are state_dict keys ("model.layers.0.mlp.down_proj.weight"). The bytes depend on the checkpoint alone:
// not on its path, on the number of threads, or on the order in which it was put together.

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "qat/core/scheme.hpp"

namespace qat {

/// One tensor on a grid.
struct QuantizedTensor {
  Scheme scheme;
  std::vector<int64_t> shape;  ///< of the weight: [R, ...], or [E, O, I] with R = E * O
  at::Tensor codes;            ///< int8[R, N], unpacked
  at::Tensor scales;           ///< float32[R, G, P], stored values
};

/// A whole model as it ships.
struct QuantizedCheckpoint {
  std::map<std::string, QuantizedTensor> quantized;  ///< by state_dict key
  /// By state_dict key: float32, float16, bfloat16 or float64, and buffers of integers or bools.
  std::map<std::string, at::Tensor> floats;
  std::map<std::string, std::string> aliases;  ///< tied key -> the key that holds the data
  std::string config;     ///< model configuration as JSON (Hugging Face's spelling), or ""
  std::string tokenizer;  ///< path of a tokenizer.json, an HF directory or a GGUF, or ""
  std::string policy;     ///< the policy as JSON, or ""
};

/// A weight (or buffer) and its name.
struct NamedTensor {
  std::string name;  ///< state_dict key
  at::Tensor value;
};

/// A tensor on its way into a checkpoint. "f32" keeps it as it is, in whatever dtype; the other grids need
/// float32.
struct Latent {
  std::string key;  ///< state_dict key
  at::Tensor value;
  Scheme scheme;
  ScaleRule scale = ScaleRule::kReference;  ///< that it was trained with
  at::Tensor scales = {};                   ///< float32[R, G, P] for kLearned, see ops.hpp
  /// Of the weight, when `value` is a view of it with other rows ([E * O, I] of [E, O, I]); else empty.
  std::vector<int64_t> shape = {};
};

/// Puts `latent` (float32[R, ...]) on the scheme's integer grid. ArgumentError for a float grid, and for what
/// ops::quantize refuses. `scales`: the learned ones, for kLearned.
QuantizedTensor quantize_tensor(const std::string& key, const at::Tensor& latent, const Scheme& scheme,
                                ScaleRule scale = ScaleRule::kReference, const at::Tensor& scales = {});

/// float32 of the tensor's shape: exactly what the consumer of the file computes.
at::Tensor dequantize_tensor(const std::string& key, const QuantizedTensor& tensor);

/// A checkpoint of these tensors, copied to the CPU: later training does not reach it. "f16" and "bf16" round
/// and are stored in their type. ArgumentError for a key given twice, an alias that is also a tensor, and an
/// alias whose target is none.
QuantizedCheckpoint freeze_tensors(const std::vector<Latent>& tensors,
                                   std::map<std::string, std::string> aliases = {}, std::string config = "",
                                   std::string tokenizer = "", std::string policy = "");

/// The weight of `key` (following aliases) as float32; integers and bools as they are. ArgumentError when
/// there is none.
at::Tensor weight_of(const QuantizedCheckpoint& checkpoint, const std::string& key);

/// `weight_of` every key, sorted, aliases included.
std::vector<NamedTensor> dequantize(const QuantizedCheckpoint& checkpoint);

/// Writes the file by atomic rename. ArgumentError naming the tensor for a checkpoint that `load` would
/// refuse; FileError when the file cannot be written. An existing file then stays as it was.
void save(const QuantizedCheckpoint& checkpoint, const std::string& path);

/// Reads and validates: format version, grids, dtypes, shapes, codes within their grid, scales finite,
/// aliases. FileError naming file and tensor.
QuantizedCheckpoint load(const std::string& path);

}  // namespace qat
