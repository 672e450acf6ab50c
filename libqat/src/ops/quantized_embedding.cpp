#include "qat/ops/quantized_embedding.hpp"

#include <ATen/ops/_unique2.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "ops/check.hpp"
#include "ops/dispatch.hpp"
#include "ops/rows.hpp"
#include "qat/ops/fake_quantize.hpp"

namespace qat::ops {
namespace {

using std::string_view;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, string_view, string_view,
                           string_view, string_view);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, string_view,
                            string_view, string_view, string_view);

c10::TypedOperatorHandle<Forward> forward_operator() {
  static const auto op = find_operator<Forward>("libqat::quantized_embedding");
  return op;
}

c10::TypedOperatorHandle<Backward> backward_operator() {
  static const auto op = find_operator<Backward>("libqat::quantized_embedding_backward");
  return op;
}

const grid::Grid& check_lookup(const Subject& subject, const at::Tensor& indices, const at::Tensor& weight,
                               int64_t padding_idx, string_view grid, string_view estimator,
                               string_view scale) {
  estimator_kind(estimator);
  scale_rule(scale);
  const grid::Grid& found = check_matrix(subject, weight, grid);
  if (indices.scalar_type() != at::kLong) fail(subject, "indices of int64", describe(indices));
  if (weight.sym_size(0).sym_le(padding_idx).guard_bool(__FILE__, __LINE__)) {
    fail(subject, "padding_idx below the number of rows of " + describe(weight), std::to_string(padding_idx));
  }
  return found;
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
                    int64_t padding_idx, string_view grid, string_view estimator, string_view scale,
                    string_view tensor) {
  const Subject subject{"quantized_embedding_backward", tensor};
  check_lookup(subject, indices, weight, padding_idx, grid, estimator, scale);
  check_activation(subject, "grad_output", grad_output, weight.sym_size(1), weight);
}

/// The rows that a batch touches.
struct Touched {
  at::Tensor rows;      ///< int64[U] on the CPU, ascending
  at::Tensor position;  ///< int64[...], shaped like the indices: where in `rows` each index is
};

Touched touched_rows(const Subject& subject, const at::Tensor& indices, int64_t row_count) {
  auto [rows, position, counts] = at::_unique2(indices.cpu(), /*sorted=*/true, /*return_inverse=*/true);
  if (rows.numel() > 0) {
    const int64_t* first = rows.const_data_ptr<int64_t>();
    const int64_t last = first[rows.numel() - 1];
    if (*first < 0 || last >= row_count) {
      fail(subject, "indices in [0, " + std::to_string(row_count) + ")",
           std::to_string(*first < 0 ? *first : last));
    }
  }
  return {rows, position};
}

/// [indices..., N] from a table of the touched rows.
at::Tensor look_up(const at::Tensor& table, const at::Tensor& position) {
  std::vector<int64_t> sizes = position.sizes().vec();
  sizes.push_back(table.size(1));
  return table.index_select(0, position.flatten()).view(sizes);
}

/// table[i] = w_hat[rows[i]] on a grid with one scale for the whole tensor, which all of `latent` decides.
void quantize_with_shared_scale(const Subject& subject, const grid::Grid& grid, ScaleRule rule,
                                const at::Tensor& latent, const at::Tensor& rows, const at::Tensor& table) {
  const float* w = latent.const_data_ptr<float>();
  std::array<float, grid::kMaxParams> s{};
  std::array<float, grid::kMaxParams> stored{};
  const auto choose = [&](int64_t) {
    const grid::Status status = grid.scales(rule, w, latent.numel(), s.data());
    return status == grid::Status::kOk ? grid.store(s.data(), latent.numel(), stored.data()) : status;
  };
  for_each_row(subject, 1, latent.numel(), [&] { return choose; }, GridRows(grid, latent));
  const int64_t n = latent.size(1);
  const int64_t* from = rows.const_data_ptr<int64_t>();
  float* w_hat = table.mutable_data_ptr<float>();
  for_each_row(subject, table.size(0), n, [&] {
    return [&, codes = std::vector<int8_t>(n)](int64_t i) mutable {
      grid.encode(w + from[i] * n, n, s.data(), codes.data());
      grid.decode(codes.data(), n, stored.data(), w_hat + i * n);
      return grid::Status::kOk;
    };
  });
}

at::Tensor forward_cpu(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                       string_view grid, string_view estimator, string_view scale, string_view tensor) {
  const Subject subject{"quantized_embedding", tensor};
  const grid::Grid& found = check_lookup(subject, indices, weight, padding_idx, grid, estimator, scale);
  const ScaleRule rule = scale_rule(scale);
  const Touched touched = touched_rows(subject, indices, weight.size(0));
  const at::Tensor latent = weight.contiguous();
  const int64_t n = latent.size(1);
  const at::Tensor table = at::empty({touched.rows.numel(), n}, latent.options());
  if (found.info().block == grid::kWholeTensor) {
    quantize_with_shared_scale(subject, found, rule, latent, touched.rows, table);
    return look_up(table, touched.position);
  }
  const float* w = latent.const_data_ptr<float>();
  const int64_t* rows = touched.rows.const_data_ptr<int64_t>();
  float* w_hat = table.mutable_data_ptr<float>();
  const auto quantize_row = [&](int64_t i) {
    return found.fake_quantize(w + rows[i] * n, n, w_hat + i * n, rule);
  };
  const auto number = [rows](int64_t i, grid::Status) { return rows[i]; };
  for_each_row(subject, table.size(0), n, [&] { return quantize_row; }, number);
  return look_up(table, touched.position);
}

at::Tensor forward_meta(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                        string_view grid, string_view estimator, string_view scale, string_view tensor) {
  check_lookup({"quantized_embedding", tensor}, indices, weight, padding_idx, grid, estimator, scale);
  c10::SymDimVector sizes(indices.sym_sizes().begin(), indices.sym_sizes().end());
  sizes.push_back(weight.sym_size(1));
  return at::empty_symint(sizes, weight.options());
}

at::Tensor forward_reference(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                             string_view grid, string_view estimator, string_view scale, string_view tensor) {
  return forward_operator()
      .call(indices.cpu(), weight.cpu(), padding_idx, grid, estimator, scale, tensor)
      .to(weight.device());
}

at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
                    int64_t padding_idx, string_view grid, string_view estimator, string_view scale,
                    string_view tensor) {
  check_backward(grad_output, indices, weight, padding_idx, grid, estimator, scale, tensor);
  const Subject subject{"quantized_embedding_backward", tensor};
  const at::Tensor rows = touched_rows(subject, indices, weight.size(0)).rows.to(weight.device());
  at::Tensor grad = at::embedding_dense_backward(grad_output.to(at::kFloat), indices, weight.size(0),
                                                 padding_idx, /*scale_grad_by_freq=*/false);
  const EstimatorKind kind = estimator_kind(estimator);
  if (kind == EstimatorKind::kSte || rows.numel() == 0) return grad;
  if (grid::find(grid).info().block == grid::kWholeTensor) {
    return fake_quantize_backward(grad, weight, grid, {kind, scale_rule(scale)}, tensor);
  }
  const at::Tensor masked = fake_quantize_backward(grad.index_select(0, rows), weight.index_select(0, rows),
                                                   grid, {kind, scale_rule(scale)}, tensor);
  return grad.index_copy_(0, rows, masked);
}

at::Tensor backward_meta(const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
                         int64_t padding_idx, string_view grid, string_view estimator, string_view scale,
                         string_view tensor) {
  check_backward(grad_output, indices, weight, padding_idx, grid, estimator, scale, tensor);
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

class QuantizedEmbedding : public torch::autograd::Function<QuantizedEmbedding> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& indices, const at::Tensor& weight,
                            int64_t padding_idx, string_view grid, string_view estimator, string_view scale,
                            string_view tensor) {
    auto& data = context->saved_data;
    data["padding_idx"] = padding_idx;
    data["grid"] = std::string(grid);
    data["estimator"] = std::string(estimator);
    data["scale"] = std::string(scale);
    data["tensor"] = std::string(tensor);
    context->save_for_backward({indices, weight});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(indices, weight, padding_idx, grid, estimator, scale, tensor);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    const auto saved = context->get_saved_variables();
    variable_list result(7);
    result[1] = backward_operator().call(grads[0], saved[0], saved[1], data["padding_idx"].toInt(),
                                         data["grid"].toStringView(), data["estimator"].toStringView(),
                                         data["scale"].toStringView(), data["tensor"].toStringView());
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                            string_view grid, string_view estimator, string_view scale, string_view tensor) {
  return QuantizedEmbedding::apply(indices, weight, padding_idx, grid, estimator, scale, tensor);
}

TORCH_LIBRARY_IMPL(libqat, CPU, m) {
  m.impl("quantized_embedding", forward_cpu);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("quantized_embedding", forward_meta);
  m.impl("quantized_embedding_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("quantized_embedding", forward_reference);
  m.impl("quantized_embedding_backward", backward);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("quantized_embedding", forward_autograd);
  m.impl("quantized_embedding_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

at::Tensor quantized_embedding(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                               string_view grid, const Estimator& estimator, string_view tensor) {
  return forward_operator().call(indices, weight, padding_idx, grid, to_string(estimator.kind),
                                 to_string(estimator.scale), tensor);
}

at::Tensor quantized_embedding_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                        const at::Tensor& weight, int64_t padding_idx, string_view grid,
                                        const Estimator& estimator, string_view tensor) {
  return backward_operator().call(grad_output, indices, weight, padding_idx, grid, to_string(estimator.kind),
                                  to_string(estimator.scale), tensor);
}

}  // namespace qat::ops
