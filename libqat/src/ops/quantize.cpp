#include "qat/ops/quantize.hpp"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "ops/check.hpp"
#include "ops/dispatch.hpp"
#include "ops/rows.hpp"
#include "qat/grid/device.hpp"

namespace qat::ops {
namespace {

using std::string_view;
using Stored = std::tuple<at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;
using Quantize = Stored(const at::Tensor&, string_view, string_view, string_view, const OptionalTensor&);
using ChooseScales = at::Tensor(const at::Tensor&, string_view, string_view, string_view);
using Dequantize = at::Tensor(const at::Tensor&, const at::Tensor&, string_view, string_view);

c10::TypedOperatorHandle<Quantize> quantize_operator() {
  static const auto op = find_operator<Quantize>("libqat::quantize");
  return op;
}

c10::TypedOperatorHandle<Dequantize> dequantize_operator() {
  static const auto op = find_operator<Dequantize>("libqat::dequantize");
  return op;
}

c10::TypedOperatorHandle<ChooseScales> choose_scales_operator() {
  static const auto op = find_operator<ChooseScales>("libqat::choose_scales");
  return op;
}

void check_has_codes(const Subject& subject, const grid::Grid& grid) {
  if (grid.info().is_float) fail(subject, "a grid with codes", std::string(grid.info().name));
}

/// A weight to be stored; arguments have been checked.
struct Source {
  const grid::Grid& grid;
  Scales scales;
};

Source check_quantize(const Subject& subject, const at::Tensor& weight, string_view grid, string_view scale,
                      const OptionalTensor& scales) {
  const grid::Grid& found = check_weight(subject, weight, grid);
  check_has_codes(subject, found);
  return {found, check_scales(subject, found, weight, scale, scales)};
}

/// Uninitialised float32[R, G, P].
at::Tensor empty_scales(const grid::Grid& grid, const at::Tensor& weight) {
  return at::empty_symint(scale_sizes(grid, weight.sym_size(0), row_size(weight)), weight.options());
}

/// Uninitialised codes int8[R, N] and their scales.
Stored empty_outputs(const grid::Grid& grid, const at::Tensor& weight) {
  const std::array<c10::SymInt, 2> codes{weight.sym_size(0), row_size(weight)};
  return {at::empty_symint(codes, weight.options().dtype(at::kChar)), empty_scales(grid, weight)};
}

Stored quantize_meta(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor,
                     const OptionalTensor& scales) {
  return empty_outputs(check_quantize({"quantize", tensor}, weight, grid, scale, scales).grid, weight);
}

Stored quantize_cpu(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor,
                    const OptionalTensor& held_scales) {
  const Subject subject{"quantize", tensor};
  const Source source = check_quantize(subject, weight, grid, scale, held_scales);
  const grid::Grid& found = source.grid;
  const auto [codes, scales] = empty_outputs(found, weight);
  const at::Tensor latent = weight.contiguous();
  const GridRows rows(found, latent);
  const int64_t n = rows.width();
  const HeldRows held(found, source.scales, n);
  const int64_t row_scales = scales.size(1) * scales.size(2);
  const float* w = latent.const_data_ptr<float>();
  int8_t* code = codes.mutable_data_ptr<int8_t>();
  float* stored = scales.mutable_data_ptr<float>();
  const auto quantize_row = [&](int64_t row) {
    const float* w_row = w + row * n;
    float* s = stored + row * row_scales;
    if (held.any()) {
      if (!grid::all_finite(w_row, n)) return grid::Status::kNotFinite;
      std::copy_n(held(row), row_scales, s);
    } else if (const auto status = found.scales(source.scales.rule, w_row, n, s);
               status != grid::Status::kOk) {
      return status;
    }
    found.encode(w_row, n, s, code + row * n);
    return found.store(s, n, s);
  };
  for_each_row(subject, rows.count(), n, [&] { return quantize_row; }, rows);
  return {codes, scales};
}

Stored quantize_reference(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor,
                          const OptionalTensor& held) {
  const auto [codes, scales] = quantize_operator().call(weight.cpu(), grid, scale, tensor, on_cpu(held));
  return {codes.to(weight.device()), scales.to(weight.device())};
}

/// Codes and stored scales are what ships: they are outside the graph.
Stored quantize_autograd(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor,
                         const OptionalTensor& scales) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return quantize_operator().call(weight, grid, scale, tensor, scales);
}

const grid::Grid& check_choose(const at::Tensor& weight, string_view grid, string_view scale,
                               string_view tensor) {
  const Subject subject{"choose_scales", tensor};
  if (is_learned(scale_rule(scale))) {
    fail(subject, "a rule that gives scales", "\"" + std::string(scale) + "\"");
  }
  return check_quantize(subject, weight, grid, scale, std::nullopt).grid;
}

at::Tensor choose_scales_meta(const at::Tensor& weight, string_view grid, string_view scale,
                              string_view tensor) {
  return empty_scales(check_choose(weight, grid, scale, tensor), weight);
}

at::Tensor choose_scales_cpu(const at::Tensor& weight, string_view grid, string_view scale,
                             string_view tensor) {
  const grid::Grid& found = check_choose(weight, grid, scale, tensor);
  const ScaleRule rule = scale_rule(scale);
  const at::Tensor scales = empty_scales(found, weight);
  const at::Tensor latent = weight.contiguous();
  const GridRows rows(found, latent);
  const int64_t n = rows.width();
  const int64_t row_scales = scales.size(1) * scales.size(2);
  const float* w = latent.const_data_ptr<float>();
  float* s = scales.mutable_data_ptr<float>();
  const auto choose_row = [&](int64_t row) {
    return found.scales(rule, w + row * n, n, s + row * row_scales);
  };
  for_each_row({"choose_scales", tensor}, rows.count(), n, [&] { return choose_row; }, rows);
  return scales;
}

at::Tensor choose_scales_reference(const at::Tensor& weight, string_view grid, string_view scale,
                                   string_view tensor) {
  return choose_scales_operator().call(weight.cpu(), grid, scale, tensor).to(weight.device());
}

/// A start for learning is no function of the latent that is learned with it.
at::Tensor choose_scales_autograd(const at::Tensor& weight, string_view grid, string_view scale,
                                  string_view tensor) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return choose_scales_operator().call(weight, grid, scale, tensor);
}

const grid::Grid& check_stored(const Subject& subject, const at::Tensor& codes, const at::Tensor& scales,
                               string_view grid) {
  const grid::Grid& found = grid::find(grid);
  check_has_codes(subject, found);
  if (codes.scalar_type() != at::kChar || codes.dim() != 2 ||
      codes.sym_numel().sym_eq(0).guard_bool(__FILE__, __LINE__)) {
    fail(subject, "codes of int8[R, N]", describe(codes));
  }
  const c10::SymInt n = codes.sym_size(1);
  const int64_t block = found.info().block;
  if (block > 0 && (n % block).sym_ne(0).guard_bool(__FILE__, __LINE__)) {
    fail(subject, "rows that blocks of " + std::to_string(block) + " divide", describe(codes));
  }
  const std::array<c10::SymInt, 3> expected = scale_sizes(found, codes.sym_size(0), n);
  if (scales.scalar_type() != at::kFloat || scales.sym_sizes() != c10::SymIntArrayRef(expected) ||
      scales.device() != codes.device()) {
    std::ostringstream text;
    text << "scales of float32" << c10::SymIntArrayRef(expected) << " on " << codes.device();
    fail(subject, text.str(), describe(scales));
  }
  return found;
}

/// Codes come from files and other programs; a decoder may index a table with them.
void check_codes(const Subject& subject, const grid::Info& info, const int8_t* codes, int64_t rows,
                 int64_t n) {
  const auto legal = [&](int8_t code) { return code >= info.code_min && code <= info.code_max; };
  const int8_t* const bad = std::find_if_not(codes, codes + rows * n, legal);
  if (bad == codes + rows * n) return;
  fail(subject,
       "codes in [" + std::to_string(info.code_min) + ", " + std::to_string(info.code_max) + "] in row " +
           std::to_string((bad - codes) / n),
       std::to_string(*bad));
}

at::Tensor dequantize_cpu(const at::Tensor& codes, const at::Tensor& scales, string_view grid,
                          string_view tensor) {
  const Subject subject{"dequantize", tensor};
  const grid::Grid& found = check_stored(subject, codes, scales, grid);
  const at::Tensor code_rows = codes.contiguous();
  const at::Tensor scale_rows = scales.contiguous();
  const int64_t rows = codes.size(0);
  const int64_t n = codes.size(1);
  const bool shared = found.info().block == grid::kWholeTensor;
  const int64_t row_scales = shared ? 0 : scales.size(1) * scales.size(2);
  const int8_t* code = code_rows.const_data_ptr<int8_t>();
  const float* scale = scale_rows.const_data_ptr<float>();
  check_codes(subject, found.info(), code, rows, n);
  at::Tensor w_hat = at::empty(codes.sizes(), scales.options());
  float* to = w_hat.mutable_data_ptr<float>();
  const auto decode_row = [&](int64_t row) {
    found.decode(code + row * n, n, scale + row * row_scales, to + row * n);
    return grid::Status::kOk;
  };
  for_each_row(subject, rows, n, [&] { return decode_row; });
  return w_hat;
}

at::Tensor dequantize_meta(const at::Tensor& codes, const at::Tensor& scales, string_view grid,
                           string_view tensor) {
  check_stored({"dequantize", tensor}, codes, scales, grid);
  return at::empty_symint(codes.sym_sizes(), scales.options());
}

at::Tensor dequantize_reference(const at::Tensor& codes, const at::Tensor& scales, string_view grid,
                                string_view tensor) {
  return dequantize_operator().call(codes.cpu(), scales.cpu(), grid, tensor).to(codes.device());
}

TORCH_LIBRARY_IMPL(libqat, CPU, m) {
  m.impl("quantize", quantize_cpu);
  m.impl("choose_scales", choose_scales_cpu);
  m.impl("dequantize", dequantize_cpu);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("quantize", quantize_meta);
  m.impl("choose_scales", choose_scales_meta);
  m.impl("dequantize", dequantize_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("quantize", quantize_reference);
  m.impl("choose_scales", choose_scales_reference);
  m.impl("dequantize", dequantize_reference);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("quantize", quantize_autograd);
  m.impl("choose_scales", choose_scales_autograd);
  m.impl("dequantize", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

void check_grid(string_view grid) {
  grid::find(grid);
}

int64_t scale_params(string_view grid) {
  return grid::find(grid).params();
}

Stored quantize(const at::Tensor& weight, string_view grid, ScaleRule scale, string_view tensor,
                const at::Tensor& scales) {
  return quantize_operator().call(weight, grid, to_string(scale), tensor, optional_tensor(scales));
}

at::Tensor choose_scales(const at::Tensor& weight, string_view grid, ScaleRule scale, string_view tensor) {
  return choose_scales_operator().call(weight, grid, to_string(scale), tensor);
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, string_view grid,
                      string_view tensor) {
  return dequantize_operator().call(codes, scales, grid, tensor);
}

}  // namespace qat::ops
