#pragma once

// Symmetric integers with one scale per group, row or tensor, as compressed-tensors and Gemma's mobile
// folders hold them. The consumer computes w = code * scale in the model's dtype, into which it has rounded
// the scale; whether that gives the trained numbers depends on the dtype.
// Legend: R rows, N weights in a row, G groups in a row.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "export/hf_dtype.hpp"
#include "qat/checkpoint/checkpoint.hpp"
#include "qat/export/export.hpp"
#include "qat/grid/grid.hpp"

namespace qat {

struct IntegerTensor {
  int bits = 0;
  int64_t block = 0;  ///< as in grid::Info: weights in a group, kWholeRow or kWholeTensor
  grid::DType stored = grid::DType::kF32;  ///< of the scales in the file
  at::Tensor codes;                        ///< int8[R, N]
  at::Tensor scales;                       ///< float32[R, G], or [1, 1] for a whole tensor
  std::vector<int64_t> shape;              ///< of the weight: [R, N], or [E, R / E, N] of E experts

  /// What the consumer computes, [R, N] in `dtype`.
  at::Tensor weight(at::ScalarType dtype) const;
};

/// Whether the grid is one of those: "int4_g32@bf16", "mobile2", ...
bool is_symmetric_integer(std::string_view grid);

/// Whether there is a grid of that name.
bool is_grid(const std::string& name);

/// A matrix, or a stack of experts' matrices, on such a grid. ArgumentError naming `key` for codes and scales
/// that the grid does not have.
IntegerTensor integer_tensor(const std::string& key, const QuantizedTensor& tensor);

/// The reverse, for a model in `dtype`: on the grid `hint` if that is the same numbers, else on one of
/// `family` ("int" or "mobile") with the scale grid that the file shows. UnsupportedError naming `key` when
/// there is none.
QuantizedTensor on_grid(const std::string& key, const IntegerTensor& tensor, const HfDtype& dtype,
                        const std::string& family, const std::string& hint);

/// The dtype in which a consumer reproduces a checkpoint, all of whose quantized tensors are symmetric
/// integers.
struct ConsumerDtype {
  const HfDtype* dtype = nullptr;
  std::vector<Obstacle> obstacles;          ///< tensors that it does not reproduce
  std::vector<std::string> rounded_floats;  ///< unquantized tensors that it rounds, as was asked for
};

/// `wanted`: its name, or "" for the narrowest that is exact. When none is, the one that the quantized
/// tensors need, with obstacles. A dtype that was asked for may round unquantized tensors.
ConsumerDtype consumer_dtype(const QuantizedCheckpoint& checkpoint, const std::string& wanted);

}  // namespace qat
