#include "qat/checkpoint/checkpoint.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <optional>
#include <tuple>

#include "module.hpp"
#include "qat/checkpoint/convert.hpp"
#include "qat/grid/grid.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using Path = std::filesystem::path;
using Named = std::pair<std::string, at::Tensor>;

/// Two names of one tensor: same memory, read in the same way.
auto identity(const at::Tensor& tensor) {
  return std::tuple(tensor.const_data_ptr(), tensor.scalar_type(), tensor.sizes().vec(),
                    tensor.strides().vec());
}

QuantizedCheckpoint freeze(const std::vector<Named>& tensors, const std::map<std::string, std::string>& grids,
                           const std::string& scale, const std::map<std::string, std::string>& scale_rules,
                           const std::map<std::string, at::Tensor>& scales, const std::string& config,
                           const std::string& tokenizer, const std::string& policy) {
  const py::gil_scoped_release unlocked;
  const auto latent_of = [&](const std::string& key, const at::Tensor& value) {
    const auto grid = grids.find(key);
    const auto rule = scale_rules.find(key);
    const auto learned = scales.find(key);
    return Latent{key,
                  value,
                  {grid == grids.end() ? "f32" : grid->second},
                  scale_rule(rule == scale_rules.end() ? scale : rule->second),
                  learned == scales.end() ? at::Tensor() : learned->second.detach()};
  };
  std::vector<Latent> latents;
  std::map<std::string, std::string> aliases;
  std::map<decltype(identity({})), std::string> first_names;
  for (const auto& [key, value] : tensors) {
    const auto [place, is_new] = first_names.emplace(identity(value), key);
    if (!is_new && value.numel() > 0) {
      aliases[key] = place->second;
      continue;
    }
    latents.push_back(latent_of(key, value));
  }
  return freeze_tensors(latents, std::move(aliases), config, tokenizer, policy);
}

std::map<std::string, std::string> grids_of(const QuantizedCheckpoint& checkpoint) {
  std::map<std::string, std::string> grids;
  for (const auto& [key, tensor] : checkpoint.quantized) grids[key] = tensor.scheme.weight;
  return grids;
}

std::pair<std::optional<QuantizedTensor>, std::string> converted(const std::string& key,
                                                                 const QuantizedTensor& tensor,
                                                                 const std::string& grid) {
  std::string why;
  auto result = convert_tensor(key, tensor, grid, &why);
  return {std::move(result), std::move(why)};
}

std::pair<QuantizedCheckpoint, std::map<std::string, std::string>> all_converted(
    const QuantizedCheckpoint& checkpoint, const std::map<std::string, std::string>& grids) {
  std::map<std::string, std::string> refused;
  auto result = convert_tensors(checkpoint, grids, refused);
  return {std::move(result), std::move(refused)};
}

std::map<std::string, at::Tensor> weights_of(const QuantizedCheckpoint& checkpoint) {
  const py::gil_scoped_release unlocked;
  std::map<std::string, at::Tensor> weights;
  for (NamedTensor& tensor : dequantize(checkpoint)) weights[tensor.name] = std::move(tensor.value);
  return weights;
}

}  // namespace

void bind_checkpoint(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<QuantizedTensor>(module, "QuantizedTensor", "One tensor on a grid.")
      .def_property_readonly(
          "grid", [](const QuantizedTensor& tensor) { return tensor.scheme.weight; }, "Name of the grid.")
      .def_readonly("shape", &QuantizedTensor::shape, "Of the weight: [R, ...].")
      .def_property_readonly(
          "nbytes",
          [](const QuantizedTensor& tensor) {
            return grid::tensor_bytes(grid::find(tensor.scheme.weight), tensor.codes.size(0),
                                      tensor.codes.size(1));
          },
          "Bytes of packed codes and stored scales in the consumer's file.")
      .def_readonly("codes", &QuantizedTensor::codes, "int8 [R, N], unpacked.")
      .def_readonly("scales", &QuantizedTensor::scales, "float32 [R, G, P], the stored values.");

  py::class_<QuantizedCheckpoint>(module, "QuantizedCheckpoint",
                                  "What ships: codes, scales and grid of each quantized tensor, all other "
                                  "tensors as they are, and the model's configuration.")
      .def_property_readonly("grids", &grids_of, "state_dict key -> grid, of the quantized tensors.")
      .def_readonly("quantized", &QuantizedCheckpoint::quantized, "state_dict key -> QuantizedTensor.")
      .def_readonly("floats", &QuantizedCheckpoint::floats, "state_dict key -> tensor, as it is stored.")
      .def("weight", &weight_of, py::arg("key"), unlocked,
           "The float32 weight of one key, aliases followed. ArgumentError when there is none.")
      .def_readonly("aliases", &QuantizedCheckpoint::aliases, "Tied key -> the key that holds the data.")
      .def_readonly("config", &QuantizedCheckpoint::config, "The model's configuration as JSON, or ''.")
      .def_readonly("tokenizer", &QuantizedCheckpoint::tokenizer,
                    "Path of a tokenizer.json, a Hugging Face folder or a GGUF, or ''.")
      .def_readonly("policy", &QuantizedCheckpoint::policy, "The policy as JSON, or ''.");

  module.def("freeze_tensors", &freeze, py::arg("tensors"), py::arg("grids"), py::kw_only(),
             py::arg("scale") = "reference", py::arg("scale_rules") = std::map<std::string, std::string>{},
             py::arg("scales") = std::map<std::string, at::Tensor>{}, py::arg("config") = "",
             py::arg("tokenizer") = "", py::arg("policy") = "",
             R"(A checkpoint of latent tensors.

Args:
    tensors: (state_dict key, tensor) pairs; a tensor given under several names is stored once, under the first.
    grids: key -> grid; tensors without one stay as they are. Latents on a grid are float32 [R, ...].
    scale: 'reference' or 'search', as in ops.quantize.
    scale_rules: key -> the rule of that tensor, where it is another one.
    scales: key -> its learned scales, where the rule is 'learned'.
    config, tokenizer, policy: see QuantizedCheckpoint.)");
  module.def("convert_tensor", &converted, py::arg("key"), py::arg("tensor"), py::arg("grid"), unlocked,
             R"(The same weights, bit for bit, on another grid: (tensor, "") or (None, the reason in words).

Nothing is quantized again; 0 and -0 count as the same number. ArgumentError naming the key for an unknown grid.)");
  module.def("convert_tensors", &all_converted, py::arg("checkpoint"), py::arg("grids"), unlocked,
             R"(A checkpoint with some tensors on other grids, the same numbers as before.

Args:
    checkpoint: what `freeze`, `load` or `import_checkpoint` returned.
    grids: state_dict key -> grid.

Returns:
    The checkpoint, and for each tensor that its grid cannot hold (it stays as it was) the reason by key.)");
  module.def("dequantize", &weights_of, py::arg("checkpoint"),
             "state_dict key -> float32 tensor: what the consumer of the file computes, aliases included.");
  module.def(
      "save",
      [](const QuantizedCheckpoint& checkpoint, const Path& path) { save(checkpoint, path.string()); },
      py::arg("checkpoint"), py::arg("path"), unlocked,
      "Writes a *.qat.safetensors file; it appears whole or not at all. The same checkpoint gives the same "
      "bytes.");
  module.def(
      "load", [](const Path& path) { return load(path.string()); }, py::arg("path"), unlocked,
      "Reads and validates a *.qat.safetensors file. FileError naming file and tensor.");
}

}  // namespace qat::python
