#include "qat/ops/quantize.hpp"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "ops/check.hpp"
#include "ops/dispatch.hpp"
#include "ops/rows.hpp"

namespace qat::ops {
namespace {

using std::string_view;
using Stored = std::tuple<at::Tensor, at::Tensor>;
using Quantize = Stored(const at::Tensor&, string_view, string_view, string_view);
using Dequantize = at::Tensor(const at::Tensor&, const at::Tensor&, string_view, string_view);

c10::TypedOperatorHandle<Quantize> quantize_operator() {
  static const auto op = find_operator<Quantize>("libqat::quantize");
  return op;
}

c10::TypedOperatorHandle<Dequantize> dequantize_operator() {
  static const auto op = find_operator<Dequantize>("libqat::dequantize");
  return op;
}

void check_has_codes(const Subject& subject, const grid::Grid& grid) {
  if (grid.info().is_float) fail(subject, "a grid with codes", std::string(grid.info().name));
}

/// G: grid blocks in a row of n weights, which the grid divides.
c10::SymInt block_count(const grid::Grid& grid, const c10::SymInt& n) {
  return grid.info().block > 0 ? n / grid.info().block : c10::SymInt(1);
}

/// [R, G, P] of the scales of codes [R, N]; [1, 1, P] where the whole tensor shares them.
std::array<c10::SymInt, 3> scale_sizes(const grid::Grid& grid, const c10::SymInt& rows,
                                       const c10::SymInt& n) {
  const bool shared = grid.info().block == grid::kWholeTensor;
  return {shared ? c10::SymInt(1) : rows, block_count(grid, n), grid.params()};
}

/// Uninitialised codes int8[R, N] and their scales.
Stored make_outputs(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor) {
  scale_rule(scale);
  const Subject subject{"quantize", tensor};
  const grid::Grid& found = check_weight(subject, weight, grid);
  check_has_codes(subject, found);
  const c10::SymInt rows = weight.sym_size(0);
  const c10::SymInt n = row_size(weight);
  const std::array<c10::SymInt, 2> codes{rows, n};
  const std::array<c10::SymInt, 3> scales = scale_sizes(found, rows, n);
  return {at::empty_symint(codes, weight.options().dtype(at::kChar)),
          at::empty_symint(scales, weight.options())};
}

Stored quantize_cpu(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor) {
  const auto [codes, scales] = make_outputs(weight, grid, scale, tensor);
  const ScaleRule rule = scale_rule(scale);
  const grid::Grid& found = grid::find(grid);
  const at::Tensor latent = weight.contiguous();
  const GridRows rows(found, latent);
  const int64_t n = rows.width();
  const int64_t row_scales = scales.size(1) * scales.size(2);
  const float* w = latent.const_data_ptr<float>();
  int8_t* code = codes.mutable_data_ptr<int8_t>();
  float* stored = scales.mutable_data_ptr<float>();
  const auto quantize_row = [&](int64_t row) {
    float* s = stored + row * row_scales;
    const grid::Status status = found.scales(rule, w + row * n, n, s);
    if (status != grid::Status::kOk) return status;
    found.encode(w + row * n, n, s, code + row * n);
    return found.store(s, n, s);
  };
  for_each_row({"quantize", tensor}, rows.count(), n, [&] { return quantize_row; }, rows);
  return {codes, scales};
}

Stored quantize_reference(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor) {
  const auto [codes, scales] = quantize_operator().call(weight.cpu(), grid, scale, tensor);
  return {codes.to(weight.device()), scales.to(weight.device())};
}

/// Codes and stored scales are what ships: they are outside the graph.
Stored quantize_autograd(const at::Tensor& weight, string_view grid, string_view scale, string_view tensor) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return quantize_operator().call(weight, grid, scale, tensor);
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
  m.impl("dequantize", dequantize_cpu);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("quantize", make_outputs);
  m.impl("dequantize", dequantize_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("quantize", quantize_reference);
  m.impl("dequantize", dequantize_reference);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("quantize", quantize_autograd);
  m.impl("dequantize", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

void check_grid(string_view grid) {
  grid::find(grid);
}

Stored quantize(const at::Tensor& weight, string_view grid, ScaleRule scale, string_view tensor) {
  return quantize_operator().call(weight, grid, to_string(scale), tensor);
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, string_view grid,
                      string_view tensor) {
  return dequantize_operator().call(codes, scales, grid, tensor);
}

}  // namespace qat::ops
