#include "qat/export/export.hpp"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <optional>

#include "module.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using Path = std::filesystem::path;

void write(const QuantizedCheckpoint& checkpoint, const Path& path, const std::string& target,
           const std::optional<Path>& tokenizer_from, const std::string& name,
           std::function<void(int64_t, int64_t)> progress) {
  const ExportOptions options{tokenizer_from ? tokenizer_from->string() : "", name, std::move(progress)};
  const py::gil_scoped_release unlocked;  // the progress callback takes the lock again by itself
  export_checkpoint(checkpoint, path.string(), target, options);
}

std::vector<Difference> compare(const Path& path, const QuantizedCheckpoint& checkpoint) {
  const py::gil_scoped_release unlocked;
  return verify(path.string(), checkpoint);
}

std::string describe(const Difference& difference) {
  return difference.tensor + ": " + difference.what + ": " + std::to_string(difference.count) + " (" +
         difference.first + ")";
}

}  // namespace

void bind_export(py::module_& module) {
  py::class_<Difference>(module, "Difference", "One difference between a file and a checkpoint.")
      .def_readonly("tensor", &Difference::tensor,
                    "State_dict key, or the file's own name of what is surplus.")
      .def_readonly(
          "what", &Difference::what,
          "'codes', 'scales', 'values', 'missing', 'extra', 'type', 'shape', 'alias' or 'metadata'.")
      .def_readonly("count", &Difference::count, "How many differ.")
      .def_readonly("first", &Difference::first, "The first of them in words.")
      .def("__repr__", &describe);

  module.def("export_targets", &export_targets, "The targets that `export` knows.");
  module.def("export", &write, py::arg("checkpoint"), py::arg("path"), py::arg("target") = "gguf",
             py::arg("tokenizer_from") = py::none(), py::arg("name") = "", py::arg("progress") = py::none(),
             R"(Writes a checkpoint as the file that a consumer opens; packs, never rounds.

The file appears whole or not at all; the same checkpoint gives the same bytes.

Args:
    checkpoint: what `freeze` or `load` returned, with the model's configuration.
    path: the file to write.
    target: "gguf".
    tokenizer_from: a GGUF, a tokenizer.json, a Hugging Face directory, or "none" for a file without
        vocabulary (llama.cpp loads it, but its server needs one); by default the checkpoint's reference.
    name: the name that the file gives the model; by default the configuration's.
    progress: called with bytes written and bytes in all.

Raises:
    ArgumentError: unknown target, no tokenizer, incomplete checkpoint or configuration.
    UnsupportedError: what the target cannot hold; the message names the tensor.
    FileError: the file cannot be written, or the tokenizer cannot be read.)");
  module.def(
      "verify", &compare, py::arg("path"), py::arg("checkpoint"),
      R"(Reads an exported file (or a checkpoint file) by its consumer's rule and compares it bit for bit.

Returns:
    A list of `Difference`; empty when the file holds exactly the checkpoint's numbers.)");
}

}  // namespace qat::python
