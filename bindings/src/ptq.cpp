#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>

#include "module.hpp"
#include "qat/ptq/gptq.hpp"
#include "qat/ptq/weighted_search.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

ptq::GptqOptions gptq_options(double damping, bool act_order, bool static_scales, int64_t block,
                              const std::string& scale) {
  return {.damping = damping,
          .act_order = act_order,
          .static_scales = static_scales,
          .block = block,
          .scale = ptq::scale_source(scale)};
}

void bind_tensors(py::module_& module) {
  const ptq::GptqOptions defaults;
  module.def(
      "gptq_tensor",
      [](const at::Tensor& weight, const at::Tensor& hessian, const std::string& grid, double damping,
         bool act_order, bool static_scales, int64_t block, const std::string& scale,
         const std::string& tensor) {
        const ptq::GptqOptions options = gptq_options(damping, act_order, static_scales, block, scale);
        const py::gil_scoped_release unlocked;
        ptq::Solution solution = ptq::gptq(weight, hessian, grid, options, tensor);
        return std::pair(std::move(solution.latent), std::move(solution.scales));
      },
      py::arg("weight"), py::arg("hessian"), py::arg("grid"), py::kw_only(),
      py::arg("damping") = defaults.damping, py::arg("act_order") = defaults.act_order,
      py::arg("static_scales") = defaults.static_scales, py::arg("block") = defaults.block,
      py::arg("scale") = std::string(ptq::to_string(defaults.scale)), py::arg("tensor") = "",
      R"(Rounds a matrix so that its layer errs least on its own inputs (GPTQ, arXiv:2210.17323).

weight: float32[R, ...] of N weights a row; hessian: float32 or float64[N, N], E[x x^T] of the layer's inputs.
Returns (latent, scales): encoding `latent`, float32 in the weight's shape, with `scales`, float32[R, G, P], gives
the method's codes. scale: "reference", "search" or "weighted" (by the hessian's diagonal). act_order: columns
by falling diagonal; whole blocks of a grid with block scales, unless static_scales takes those from the weights
as they were. NumericError for a hessian that is not positive definite with that damping.)");
  module.def(
      "weighted_search",
      [](const at::Tensor& weight, const at::Tensor& importance, const std::string& grid,
         const std::string& tensor) { return ptq::weighted_search(weight, importance, grid, tensor); },
      py::arg("weight"), py::arg("importance"), py::arg("grid"), py::kw_only(), py::arg("tensor") = "",
      py::call_guard<py::gil_scoped_release>(),
      "Scales float32[R, G, P] of least squared error, each weight counted by its column's importance[N].");
}

}  // namespace

void bind_ptq(py::module_& module) {
  bind_tensors(module);
}

}  // namespace qat::python
