#pragma once

// Argument checks that all operators share. They read symbolic sizes, so meta kernels make them too.

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "qat/core/scheme.hpp"
#include "qat/grid/grid.hpp"

namespace qat::ops {

/// What a message names: the operator and the weight.
struct Subject {
  std::string_view op;
  std::string_view tensor;  ///< parameter name; may be empty
};

/// "op: tensor"; "weight" stands for a tensor without a name.
std::string to_string(const Subject& subject);

/// Throws ArgumentError "op: tensor: expected ..., got ...".
[[noreturn]] void fail(const Subject& subject, const std::string& expected, const std::string& got);

/// "BFloat16[2, 3]".
std::string describe(const at::Tensor& tensor);

/// N, the weights in a row of [R, ...].
c10::SymInt row_size(const at::Tensor& weight);

/// A latent must be a non-empty float32[R, ...] whose rows the grid divides. Returns the grid.
const grid::Grid& check_weight(const Subject& subject, const at::Tensor& weight, std::string_view grid);

/// As check_weight, for layers whose weight is a matrix.
const grid::Grid& check_matrix(const Subject& subject, const at::Tensor& weight, std::string_view grid);

/// G: grid blocks in a row of n weights, which the grid divides.
c10::SymInt block_count(const grid::Grid& grid, const c10::SymInt& n);

/// [R, G, P] of the scales of R rows of n weights; [1, 1, P] where the whole tensor shares them.
std::array<c10::SymInt, 3> scale_sizes(const grid::Grid& grid, const c10::SymInt& rows, const c10::SymInt& n);

/// Where the scales of a tensor come from.
struct Scales {
  ScaleRule rule = ScaleRule::kReference;
  at::Tensor held = {};  ///< float32[R, G, P] when the rule is kLearned and the grid has scales
};

/// The arguments `scale` and `scales` of an operator. Scales must be given exactly when the rule is "learned"
/// and the grid has any.
Scales check_scales(const Subject& subject, const grid::Grid& grid, const at::Tensor& weight,
                    std::string_view scale, const std::optional<at::Tensor>& scales);

/// Scales as operators take them: nothing where undefined.
inline std::optional<at::Tensor> optional_tensor(const at::Tensor& scales) {
  return scales.defined() ? std::optional(scales) : std::nullopt;
}

/// For the references of devices without kernels.
std::optional<at::Tensor> on_cpu(const std::optional<at::Tensor>& scales);

/// Whether gradients pass the rounding unchanged, whatever the grid.
bool is_identity(std::string_view estimator, std::string_view scale);
/// The same, and on any grid without scales.
bool is_identity(const Estimator& estimator, const grid::Grid& grid);

/// `value` must be float32, bfloat16 or float16, of `last` elements in its last dimension, on weight's
/// device. `what` names the argument.
void check_activation(const Subject& subject, const char* what, const at::Tensor& value,
                      const c10::SymInt& last, const at::Tensor& weight);

/// `value` must be float32 of weight's shape.
void check_like_weight(const Subject& subject, const char* what, const at::Tensor& value,
                       const at::Tensor& weight);

}  // namespace qat::ops
