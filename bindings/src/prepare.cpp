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

py::object report(const PreparedDecoder& prepared) {
  return py::module_::import("libqat.report").attr("Report")(prepared.model.report());
}

void bind_report(py::module_& module) {
  py::class_<TensorReport>(module, "TensorReport", "How one tensor ships.")
      .def_readonly("name", &TensorReport::name, "state_dict key.")
      .def_property_readonly(
          "kind", [](const TensorReport& row) { return to_string(row.kind); },
          "'linear', 'embedding', 'conv' or 'other'.")
      .def_property_readonly(
          "shape", [](const TensorReport& row) { return py::tuple(py::cast(row.shape)); },
          "Of the weight: (R, ...).")
      .def_readonly("grid", &TensorReport::grid, "Name of the grid, or the tensor's own type.")
      .def_readonly("input", &TensorReport::input, "Format of what goes into the product with it, or ''.")
      .def_readonly("output", &TensorReport::output, "Format of what comes out of it, or ''.")
      .def_readonly("bits_per_weight", &TensorReport::bits_per_weight, "Scales included.")
      .def_readonly("bytes", &TensorReport::bytes, "Codes and scales.")
      .def_readonly("relative_error", &TensorReport::relative_error,
                    "RMS(w_hat - w) / RMS(w); 0 for tensors kept as they are.");
  module.def(
      "report_tensor",
      [](const std::string& name, const std::string& kind, const at::Tensor& latent, const std::string& grid,
         const std::string& scale, const std::optional<at::Tensor>& scales, const std::string& input,
         const std::string& output) {
        TensorReport row = report_tensor(name, slot_kind(kind), latent, {grid}, scale_rule(scale),
                                         scales.value_or(at::Tensor()));
        row.input = input;
        row.output = output;
        return row;
      },
      py::arg("name"), py::arg("kind"), py::arg("latent"), py::arg("grid"), py::arg("scale") = "reference",
      py::arg("scales") = py::none(), py::arg("input") = "", py::arg("output") = "",
      py::call_guard<py::gil_scoped_release>(),
      "The TensorReport of one tensor; grid 'f32' keeps it. scales: the learned ones, for the rule "
      "'learned'. input, output: formats of activations.");
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
  bind_report(module);
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<PreparedDecoder, std::shared_ptr<PreparedDecoder>>(
      module, "PreparedDecoder", "A Decoder with a policy attached. Its parameters are the latents.")
      .def_readonly("decoder", &PreparedDecoder::decoder, "The Decoder itself.")
      .def_property_readonly(
          "policy", [](const PreparedDecoder& prepared) { return prepared.model.policy(); }, "Its Policy.")
      .def("report", &report, "A `libqat.Report`: a TensorReport of each parameter; printable.")
      .def(
          "set_enabled", [](PreparedDecoder& prepared, bool enabled) { prepared.model.set_enabled(enabled); },
          py::arg("enabled"), "Whether forward sees the quantized weights or the float latents.")
      .def(
          "set_calibrating",
          [](PreparedDecoder& prepared, bool calibrating) { prepared.model.set_calibrating(calibrating); },
          py::arg("calibrating"),
          "While on, every forward pass widens the static activation scales to its activations.")
      .def(
          "activation_scales",
          [](const PreparedDecoder& prepared) {
            std::map<std::string, float> scales;
            for (const auto& activation : prepared.model.activations()) {
              if (activation->has_scale()) scales[activation->name()] = activation->scale().item<float>();
            }
            return scales;
          },
          "Name in checkpoints -> static activation scale; 0: not calibrated yet.")
      .def(
          "scale_parameters",
          [](const PreparedDecoder& prepared) {
            std::vector<std::pair<std::string, at::Tensor>> scales;
            for (const NamedTensor& scale : prepared.model.scale_parameters()) {
              scales.emplace_back(scale.name, scale.value);
            }
            return scales;
          },
          "(name, float32 [R, G, P]) of each learned scale, in model order: '<weight's key>_scales'.")
      .def(
          "initialize_scales",
          [](PreparedDecoder& prepared, const std::string& scale) {
            prepared.model.initialize_scales(scale_rule(scale));
          },
          py::arg("scale") = "search", unlocked,
          "Sets all learned scales to those that a rule gives to the present latents, as `prepare` did.")
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
