#include "qat/ops/seq.hpp"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <sstream>

#include "ops/check.hpp"
#include "ops/dispatch.hpp"
#include "ops/rows.hpp"
#include "qat/grid/seq.hpp"

namespace qat::ops {
namespace {

using std::string_view;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Tie = at::Tensor(const at::Tensor&, string_view, string_view);
using Start = at::Tensor(const at::Tensor&, string_view, string_view, string_view);

c10::TypedOperatorHandle<Tie> tie_operator() {
  static const auto op = find_operator<Tie>("libqat::seq_tie");
  return op;
}

c10::TypedOperatorHandle<Tie> tie_backward_operator() {
  static const auto op = find_operator<Tie>("libqat::seq_tie_backward");
  return op;
}

c10::TypedOperatorHandle<Start> start_operator() {
  static const auto op = find_operator<Start>("libqat::seq_start");
  return op;
}

const grid::Grid& check_grid_of(const Subject& subject, string_view name) {
  const grid::Grid& found = grid::find(name);
  if (!grid::holds_seq(found)) {
    fail(subject, "a grid that holds SEQ (" + grid::seq_names() + ")", std::string(found.info().name));
  }
  return found;
}

/// `values` must be float32[R, G, last].
void check_parameters(const Subject& subject, const char* what, const at::Tensor& values, int64_t last) {
  if (values.scalar_type() == at::kFloat && values.dim() == 3 &&
      values.sym_size(2).sym_eq(last).guard_bool(__FILE__, __LINE__)) {
    return;
  }
  fail(subject, std::string(what) + " of float32[R, G, " + std::to_string(last) + "]", describe(values));
}

/// The two directions of the tie: what goes in and comes out per block.
struct Direction {
  const grid::Grid& grid;
  const char* what;
  int64_t from, to;
};

Direction forward_of(string_view grid, string_view tensor) {
  const grid::Grid& found = check_grid_of({"seq_tie", tensor}, grid);
  return {found, "free parameters", grid::seq_params(found), found.params()};
}

Direction backward_of(string_view grid, string_view tensor) {
  const grid::Grid& found = check_grid_of({"seq_tie_backward", tensor}, grid);
  return {found, "grad", found.params(), grid::seq_params(found)};
}

at::Tensor empty_output(const Subject& subject, const Direction& direction, const at::Tensor& values) {
  check_parameters(subject, direction.what, values, direction.from);
  const std::array<c10::SymInt, 3> sizes{values.sym_size(0), values.sym_size(1), direction.to};
  return at::empty_symint(sizes, values.options());
}

/// Rows of blocks through one of the functions of the grid.
template <class Function>
at::Tensor map_blocks(const Subject& subject, const Direction& direction, const at::Tensor& values,
                      const Function& function) {
  at::Tensor result = empty_output(subject, direction, values);
  const at::Tensor dense = values.contiguous();
  const int64_t rows = values.size(0), blocks = values.size(1);
  const int64_t n = blocks * direction.grid.info().block;
  const float* from = dense.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  if (rows == 0 || n == 0) return result;
  for_each_row(subject, rows, n, [&] {
    return [&](int64_t row) {
      function(direction.grid, from + row * blocks * direction.from, n, to + row * blocks * direction.to);
      return grid::Status::kOk;
    };
  });
  return result;
}

at::Tensor tie_cpu(const at::Tensor& free, string_view grid, string_view tensor) {
  return map_blocks({"seq_tie", tensor}, forward_of(grid, tensor), free, grid::seq_tie);
}

at::Tensor tie_meta(const at::Tensor& free, string_view grid, string_view tensor) {
  return empty_output({"seq_tie", tensor}, forward_of(grid, tensor), free);
}

at::Tensor tie_reference(const at::Tensor& free, string_view grid, string_view tensor) {
  return tie_operator().call(free.cpu(), grid, tensor).to(free.device());
}

at::Tensor tie_backward_cpu(const at::Tensor& grad, string_view grid, string_view tensor) {
  return map_blocks({"seq_tie_backward", tensor}, backward_of(grid, tensor), grad, grid::seq_tie_backward);
}

at::Tensor tie_backward_meta(const at::Tensor& grad, string_view grid, string_view tensor) {
  return empty_output({"seq_tie_backward", tensor}, backward_of(grid, tensor), grad);
}

at::Tensor tie_backward_reference(const at::Tensor& grad, string_view grid, string_view tensor) {
  return tie_backward_operator().call(grad.cpu(), grid, tensor).to(grad.device());
}

class SeqTie : public torch::autograd::Function<SeqTie> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& free, string_view grid,
                            string_view tensor) {
    context->saved_data["grid"] = std::string(grid);
    context->saved_data["tensor"] = std::string(tensor);
    const at::AutoDispatchBelowADInplaceOrView guard;
    return tie_operator().call(free, grid, tensor);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    return {
        tie_backward_operator().call(grads[0], data["grid"].toStringView(), data["tensor"].toStringView()),
        at::Tensor(), at::Tensor()};
  }
};

at::Tensor tie_autograd(const at::Tensor& free, string_view grid, string_view tensor) {
  return SeqTie::apply(free, grid, tensor);
}

/// The checked grid of a start.
const grid::Grid& check_start(const at::Tensor& weight, string_view grid, string_view scale,
                              string_view tensor) {
  const Subject subject{"seq_start", tensor};
  const ScaleRule rule = scale_rule(scale);
  if (rule != ScaleRule::kReference && rule != ScaleRule::kSearch) {
    fail(subject, "the rule reference or search", "\"" + std::string(scale) + "\"");
  }
  check_grid_of(subject, grid);
  return check_weight(subject, weight, grid);
}

at::Tensor empty_free(const grid::Grid& grid, const at::Tensor& weight) {
  const std::array<c10::SymInt, 3> sizes{weight.sym_size(0), block_count(grid, row_size(weight)),
                                         grid::seq_params(grid)};
  return at::empty_symint(sizes, weight.options());
}

at::Tensor start_cpu(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor) {
  const grid::Grid& found = check_start(weight, grid, scale, tensor);
  const bool searches = scale_rule(scale) == ScaleRule::kSearch;
  at::Tensor free = empty_free(found, weight);
  const at::Tensor latent = weight.contiguous();
  const int64_t rows = weight.size(0), n = latent.numel() / rows, row_free = free.numel() / rows;
  const float* w = latent.const_data_ptr<float>();
  float* to = free.mutable_data_ptr<float>();
  for_each_row({"seq_start", tensor}, rows, n, [&] {
    return [&](int64_t row) {
      float* parameters = to + row * row_free;
      return searches ? grid::seq_search(found, w + row * n, n, parameters)
                      : grid::seq_start(found, w + row * n, n, parameters);
    };
  });
  return free;
}

at::Tensor start_meta(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor) {
  return empty_free(check_start(weight, grid, scale, tensor), weight);
}

at::Tensor start_reference(const at::Tensor& weight, string_view grid, string_view scale,
                           string_view tensor) {
  return start_operator().call(weight.cpu(), grid, scale, tensor).to(weight.device());
}

/// A start for learning is no function of the latent that is learned with it.
at::Tensor start_autograd(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return start_operator().call(weight, grid, scale, tensor);
}

TORCH_LIBRARY_IMPL(libqat, CPU, m) {
  m.impl("seq_tie", tie_cpu);
  m.impl("seq_tie_backward", tie_backward_cpu);
  m.impl("seq_start", start_cpu);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("seq_tie", tie_meta);
  m.impl("seq_tie_backward", tie_backward_meta);
  m.impl("seq_start", start_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("seq_tie", tie_reference);
  m.impl("seq_tie_backward", tie_backward_reference);
  m.impl("seq_start", start_reference);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("seq_tie", tie_autograd);
  m.impl("seq_tie_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("seq_start", start_autograd);
}

}  // namespace

at::Tensor seq_tie(const at::Tensor& free, string_view grid, string_view tensor) {
  return tie_operator().call(free, grid, tensor);
}

at::Tensor seq_tie_backward(const at::Tensor& grad, string_view grid, string_view tensor) {
  return tie_backward_operator().call(grad, grid, tensor);
}

at::Tensor seq_untie(const at::Tensor& scales, string_view grid, string_view tensor) {
  const Subject subject{"seq_untie", tensor};
  const grid::Grid& found = check_grid_of(subject, grid);
  const at::Tensor values = scales.detach().cpu();
  const at::Tensor free = map_blocks(subject, {found, "scales", found.params(), grid::seq_params(found)},
                                     values, grid::seq_untie);
  if (!tie_operator().call(free, grid, tensor).equal(values)) {
    fail(subject, "scales that are tied as SEQ ties them", "others");
  }
  return free.to(scales.device());
}

at::Tensor seq_start(const at::Tensor& weight, string_view grid, ScaleRule from, string_view tensor) {
  return start_operator().call(weight, grid, to_string(from), tensor);
}

int64_t seq_params(string_view grid) {
  const grid::Grid& found = grid::find(grid);
  return grid::holds_seq(found) ? grid::seq_params(found) : 0;
}

void check_seq(string_view grid, string_view tensor) {
  if (grid::find(grid).params() > 0) check_grid_of({"check_seq", tensor}, grid);
}

}  // namespace qat::ops
