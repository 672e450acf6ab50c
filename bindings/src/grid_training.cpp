// The functions of the grids that training with held and learned scales calls.

#include <algorithm>
#include <string>
#include <tuple>

#include "grid_rows.hpp"

namespace qat::python {
namespace {

void check_like(const char* function, const Floats& w, const Floats& g) {
  if (g.ndim() == 2 && g.shape(0) == w.shape(0) && g.shape(1) == w.shape(1)) return;
  refuse(function, "gradients like the weights, " + shape_text(w), shape_text(g));
}

Floats fake_quantize_with(const std::string& name, const Floats& w, const Floats& s, bool reference) {
  Rows rows = rows_of("fake_quantize_with", name, w);
  check_scales("fake_quantize_with", rows, s);
  const grid::Grid& grid = reference ? grid::reference(name) : rows.grid;
  Floats w_hat = make_matrix<Floats>(rows.rows, rows.n);
  const float* in = w.data();
  const float* scales = s.data();
  float* out = w_hat.mutable_data();
  for_rows("fake_quantize_with", rows, [&](int64_t r) {
    return grid.fake_quantize_with(in + r * rows.n, rows.n, scales + r * rows.scales(), out + r * rows.n);
  });
  return w_hat;
}

std::tuple<Floats, Floats> backward(const std::string& name, const Floats& w, const Floats& s,
                                    const Floats& g, const std::string& estimator) {
  const EstimatorKind kind = estimator_kind(estimator);
  const Rows rows = rows_of("backward", name, w);
  check_scales("backward", rows, s);
  check_like("backward", w, g);
  Floats grad_w = make_matrix<Floats>(rows.rows, rows.n);
  Floats grad_s = make_scales(rows);
  const float* weights = w.data();
  const float* scales = s.data();
  const float* in = g.data();
  float* of_w = grad_w.mutable_data();
  float* of_s = grad_s.mutable_data();
  for_rows("backward", rows, [&](int64_t r) {
    return rows.grid.backward(weights + r * rows.n, rows.n, scales + r * rows.scales(), in + r * rows.n, kind,
                              of_w + r * rows.n, of_s + r * rows.scales());
  });
  return {grad_w, grad_s};
}

Floats choose_backward(const std::string& name, const Floats& w, const Floats& grad_s) {
  const Rows rows = rows_of("choose_backward", name, w);
  check_scales("choose_backward", rows, grad_s);
  Floats grad_w = make_matrix<Floats>(rows.rows, rows.n);
  const float* weights = w.data();
  const float* scales = grad_s.data();
  float* out = grad_w.mutable_data();
  std::fill_n(out, grad_w.size(), 0.0F);
  for_rows("choose_backward", rows, [&](int64_t r) {
    return rows.grid.choose_backward(weights + r * rows.n, rows.n, scales + r * rows.scales(),
                                     out + r * rows.n);
  });
  return grad_w;
}

}  // namespace

void bind_grid_training(py::module_& module) {
  using py::arg;
  module.def("grid_fake_quantize_with", &fake_quantize_with, arg("name"), arg("w").noconvert(),
             arg("s").noconvert(), arg("reference") = false,
             "grid_fake_quantize with unstored scales s float32[rows, n / B, P] that the caller holds.");
  module.def("grid_backward", &backward, arg("name"), arg("w").noconvert(), arg("s").noconvert(),
             arg("g").noconvert(), arg("estimator"),
             "(grad_w float32[rows, n], grad_s float32[rows, n / B, P]) of grid_fake_quantize_with, from "
             "g = dL/dw_hat.");
  module.def("grid_choose_backward", &choose_backward, arg("name"), arg("w").noconvert(),
             arg("grad_s").noconvert(),
             "grad_w float32[rows, n] of grid_choose, from grad_s float32[rows, n / B, P]; UnsupportedError "
             "where the rule is a search or rounds.");
}

}  // namespace qat::python
