#include "qat/prepare/prepare.hpp"

#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "callables.hpp"
#include "module.hpp"
#include "qat/core/error.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

/// A Python function that may be copied and destroyed without the GIL.
class PythonFunction {
 public:
  explicit PythonFunction(py::object function)
      : function_(new py::object(std::move(function)), [](py::object* held) {
          const py::gil_scoped_acquire locked;
          delete held;
        }) {}

  at::Tensor operator()(const at::Tensor& tokens) const {
    const py::gil_scoped_acquire locked;
    const py::object result = (*function_)(tokens);
    if (!THPVariable_Check(result.ptr())) {
      throw ArgumentError("model: expected logits as a tensor, got " +
                          py::str(py::type::of(result)).cast<std::string>());
    }
    return result.cast<at::Tensor>();
  }

 private:
  std::shared_ptr<py::object> function_;
};

py::list report(const PreparedDecoder& prepared) {
  py::list rows;
  for (const TensorReport& row : prepared.model.report()) {
    rows.append(py::dict(py::arg("name") = row.name, py::arg("kind") = to_string(row.kind),
                         py::arg("shape") = py::tuple(py::cast(row.shape)), py::arg("grid") = row.grid,
                         py::arg("bits_per_weight") = row.bits_per_weight, py::arg("bytes") = row.bytes,
                         py::arg("relative_error") = row.relative_error));
  }
  return rows;
}

}  // namespace

eval::LogitsFunction logits_function(const py::object& model, const std::string& argument) {
  if (py::isinstance<models::Decoder>(model)) {
    return [decoder = model.cast<std::shared_ptr<models::Decoder>>()](const at::Tensor& tokens) {
      return decoder->forward(tokens);
    };
  }
  if (py::isinstance<PreparedDecoder>(model)) {
    return [prepared = model.cast<std::shared_ptr<PreparedDecoder>>()](const at::Tensor& tokens) {
      const auto scope = prepared->model.quantized();
      return prepared->decoder->forward(tokens);
    };
  }
  if (PyCallable_Check(model.ptr())) return PythonFunction(model);
  throw ArgumentError(argument + ": expected a decoder or a function of tokens, got " +
                      py::str(py::type::of(model)).cast<std::string>());
}

void bind_prepare(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<PreparedDecoder, std::shared_ptr<PreparedDecoder>>(
      module, "PreparedDecoder", "A Decoder with a policy attached. Its parameters are the latents.")
      .def_readonly("decoder", &PreparedDecoder::decoder, "The Decoder itself.")
      .def_property_readonly(
          "policy", [](const PreparedDecoder& prepared) { return prepared.model.policy(); }, "Its Policy.")
      .def("report", &report,
           "One dict per parameter: name, kind, shape, grid, bits_per_weight (scales included), bytes and "
           "relative_error (RMS(w_hat - w) / RMS(w)).")
      .def(
          "set_enabled", [](PreparedDecoder& prepared, bool enabled) { prepared.model.set_enabled(enabled); },
          py::arg("enabled"), "Whether forward sees the quantized weights or the float latents.")
      .def(
          "freeze",
          [](const PreparedDecoder& prepared, const std::string& config, const std::string& tokenizer) {
            return freeze(prepared.model, config, tokenizer);
          },
          py::arg("config") = "", py::arg("tokenizer") = "", unlocked,
          "The QuantizedCheckpoint of the present latents. config: JSON in Hugging Face's spelling; "
          "tokenizer: "
          "a path, see QuantizedCheckpoint.");
  module.def(
      "prepare_decoder",
      [](std::shared_ptr<models::Decoder> decoder, const Policy& policy) {
        return std::make_shared<PreparedDecoder>(PreparedDecoder{decoder, prepare(decoder, policy)});
      },
      py::arg("decoder"), py::arg("policy"), unlocked,
      "Attaches a Policy to a Decoder, in place. ArgumentError for a rule that matches nothing and for "
      "widths "
      "that a grid's block does not divide, naming the tensor.");
}

}  // namespace qat::python
