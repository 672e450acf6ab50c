// What the methods of ptq.cpp return, and the sums that they and models of torch.nn are measured by.

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>

#include "module.hpp"
#include "qat/ptq/apply.hpp"
#include "qat/ptq/awq.hpp"
#include "qat/ptq/calibration.hpp"
#include "qat/ptq/expected_kl.hpp"
#include "qat/ptq/input_correction.hpp"
#include "qat/ptq/layer_sensitivity.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

void bind_results(py::module_& module) {
  module.def(
      "expected_kl", &ptq::expected_kl, py::arg("errors"), py::arg("hessian"), py::arg("outputs"),
      py::call_guard<py::gil_scoped_release>(),
      R"(1/2 sum_k tr(G_k E_k H E_k^T): nats per token that an error of a weight is expected to add to KL.

errors: float32[R, N], W - W^; hessian: float[N, N], E[u x x^T]; outputs: float32[K, S, S], E[g g^T] of groups of rows.)");
  py::class_<ptq::RoundedTensor>(module, "RoundedTensor",
                                 "What a method that looks at a layer's inputs made of one weight.")
      .def(py::init([](std::string name, std::string grid, double output_error,
                       std::optional<double> expected_kl) {
             return ptq::RoundedTensor{std::move(name), std::move(grid), output_error, expected_kl};
           }),
           py::arg("name"), py::arg("grid"), py::arg("output_error"), py::arg("expected_kl") = py::none())
      .def_readonly("name", &ptq::RoundedTensor::name, "state_dict key.")
      .def_readonly("grid", &ptq::RoundedTensor::grid, "Name of its grid.")
      .def_readonly("output_error", &ptq::RoundedTensor::output_error,
                    "RMS of the error of the layer's outputs over the RMS of its outputs, on the calibration "
                    "text.")
      .def_readonly(
          "expected_kl", &ptq::RoundedTensor::expected_kl,
          "What its error alone is expected to add to the KL divergence to the float model, nats per "
          "token; None of tables, and of methods without gradients.")
      .def("__repr__", [](const ptq::RoundedTensor& one) {
        return py::str("RoundedTensor(name={!r}, grid={!r}, output_error={:.4f})")
            .format(one.name, one.grid, one.output_error);
      });
  py::class_<ptq::AwqFold>(module, "AwqFold", "Where AWQ folded a scale of input channels.")
      .def_readonly("producers", &ptq::AwqFold::producers, "Parameters that were divided by it.")
      .def_readonly("weights", &ptq::AwqFold::weights, "Weights whose columns were multiplied by it.")
      .def_readonly("alpha", &ptq::AwqFold::alpha, "The exponent that was chosen; 0 scales nothing.")
      .def_readonly("error", &ptq::AwqFold::error,
                    "Squared error of the layers' outputs over that without scaling, on the rows measured.")
      .def("__repr__", [](const ptq::AwqFold& fold) {
        return py::str("AwqFold(producers={!r}, weights={!r}, alpha={:.2f}, error={:.4f})")
            .format(fold.producers, fold.weights, fold.alpha, fold.error);
      });
}

void bind_moments(py::module_& module) {
  py::class_<ptq::InputMoments>(module, "InputMoments",
                                "Moments of a layer's inputs, summed over calls; N^2 float64 of memory.")
      .def(py::init<int64_t>(), py::arg("width"))
      .def(
          "add",
          [](ptq::InputMoments& moments, const at::Tensor& input, const std::optional<at::Tensor>& weights) {
            moments.add(input, weights.value_or(at::Tensor()));
          },
          py::arg("input"), py::arg("weights") = py::none(), py::call_guard<py::gil_scoped_release>(),
          "input: floats [..., N]; each of its vectors counts once, or weights[...] times. ArgumentError for "
          "another "
          "width.")
      .def_property_readonly("count", &ptq::InputMoments::count, "Vectors added so far.")
      .def("second", &ptq::InputMoments::second, "E[x x^T], float64[N, N].")
      .def("magnitude", &ptq::InputMoments::magnitude, "E[|x|], float64[N].");
  py::class_<ptq::InputDrift>(module, "InputDrift",
                              "How far a layer's inputs are from the float model's; N^2 float64 of memory.")
      .def(py::init<int64_t>(), py::arg("width"))
      .def(
          "add",
          [](ptq::InputDrift& drift, const at::Tensor& reference, const at::Tensor& input,
             const std::optional<at::Tensor>& weights) {
            drift.add(reference, input, weights.value_or(at::Tensor()));
          },
          py::arg("reference"), py::arg("input"), py::arg("weights") = py::none(),
          py::call_guard<py::gil_scoped_release>(),
          "reference, input: floats [..., N], the same vectors x* of the float and x of the rounded model; "
          "each counts once, or weights[...] times. ArgumentError for another width.")
      .def("mean", &ptq::InputDrift::mean, "E[(x* - x) x^T], float64[N, N].");
  module.def(
      "input_correction",
      [](const at::Tensor& hessian, const at::Tensor& drift, double share, double damping,
         const std::string& tensor) { return ptq::input_correction(hessian, drift, share, damping, tensor); },
      py::arg("hessian"), py::arg("drift"), py::kw_only(), py::arg("share"), py::arg("damping"),
      py::arg("tensor") = "", py::call_guard<py::gil_scoped_release>(),
      "share * E[(x* - x) x^T] (H + damping)^-1, float32[N, N]: added to the identity, what rows of a weight "
      "are multiplied by so that they make up for their inputs' drift.");
}

std::optional<at::Tensor> defined(at::Tensor tensor) {
  return tensor.defined() ? std::optional(std::move(tensor)) : std::nullopt;
}

void bind_layer_sensitivity(py::module_& module) {
  using Sums = ptq::LayerSensitivity;
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<Sums>(module, "LayerSensitivity",
                   "What gradients say of one weight, summed over calls of its layer.")
      .def(py::init<std::string>(), py::arg("tensor"))
      .def("expect", &Sums::expect, py::arg("tokens"),
           "The place of a call with that many tokens, which count for nothing until a gradient is added.")
      .def("add", &Sums::add, py::arg("place"), py::arg("gradient"), unlocked,
           "gradient: floats [..., O] at the outputs of the call at that place. ArgumentError for another "
           "count "
           "of tokens or outputs.")
      .def("add_lookups", &Sums::add_lookups, py::arg("gradient"), unlocked,
           "gradient: floats [..., N] at the rows of the weight that a call looked up.")
      .def("counts", &Sums::counts,
           "Whether the loss depends on the layer. NumericError for gradients that are not finite.")
      .def("tokens", &Sums::tokens, unlocked,
           "float32[tokens] of mean 1, call by call: mean squared gradients over the outputs, clipped at 8 "
           "means.")
      .def(
          "outputs", [](const Sums& sums) { return defined(sums.outputs()); }, unlocked,
          "float32[K, S, S], E[g g^T] of groups of outputs; None where rows were looked up, and above 32,768 "
          "outputs.")
      .def(
          "lookups", [](const Sums& sums) { return defined(sums.lookups()); }, unlocked,
          "float64[N, N], what looked-up rows add to E[s x x^T]; None where none were.");
}

}  // namespace

void bind_ptq_results(py::module_& module) {
  bind_results(module);
  bind_moments(module);
  bind_layer_sensitivity(module);
}

}  // namespace qat::python
