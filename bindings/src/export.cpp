#include "qat/export/export.hpp"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <optional>
#include <tuple>

#include "module.hpp"
#include "qat/export/plan.hpp"
#include "qat/export/requantization.hpp"
#include "qat/prepare/outline.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using Path = std::filesystem::path;

std::vector<Obstacle> obstacles(const QuantizedCheckpoint& checkpoint, const std::string& target,
                                const std::string& dtype, bool require_exact) {
  ExportOptions options;
  options.dtype = dtype;
  options.require_exact = require_exact;
  const py::gil_scoped_release unlocked;
  return can_export(checkpoint, target, options);
}

QuantizedCheckpoint read(const Path& path) {
  const py::gil_scoped_release unlocked;
  return import_checkpoint(path.string());
}

void write(const QuantizedCheckpoint& checkpoint, const Path& path, const std::string& target,
           const std::optional<Path>& tokenizer_from, const std::string& name,
           const std::optional<std::function<void(int64_t, int64_t)>>& progress, const std::string& dtype,
           int64_t max_shard_bytes, bool require_exact, bool overwrite) {
  const ExportOptions options{tokenizer_from ? tokenizer_from->string() : "",
                              name,
                              progress.value_or(nullptr),
                              dtype,
                              max_shard_bytes,
                              require_exact,
                              overwrite};
  const py::gil_scoped_release unlocked;  // the progress callback takes the lock again by itself
  export_checkpoint(checkpoint, path.string(), target, options);
}

std::vector<Requantization> requantize(const QuantizedCheckpoint& checkpoint, const std::string& dtype) {
  const py::gil_scoped_release unlocked;
  return requantization_report(checkpoint, dtype);
}

QuantizedCheckpoint outline_of(
    const std::vector<std::tuple<std::string, std::string, std::vector<int64_t>>>& tensors,
    const Policy& policy, at::ScalarType dtype, const std::string& config) {
  std::vector<Target> targets;
  for (const auto& [name, kind, shape] : tensors) targets.push_back({name, slot_kind(kind), shape});
  return outline(targets, policy, dtype, config);
}

std::pair<std::vector<FileTensor>, std::vector<Obstacle>> plan(const QuantizedCheckpoint& checkpoint,
                                                               const std::string& target,
                                                               const std::string& dtype) {
  ExportPlan plan = plan_export(checkpoint, target, dtype);
  return {std::move(plan.tensors), std::move(plan.obstacles)};
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
      .def_readonly("what", &Difference::what,
                    "'codes', 'scales', 'values', 'rounded' (nothing but rounding to the file's float type), "
                    "'missing', "
                    "'extra', 'type', 'shape', 'alias' or 'metadata'.")
      .def_readonly("count", &Difference::count, "How many differ.")
      .def_readonly("first", &Difference::first, "The first of them in words.")
      .def("__repr__", &describe);

  py::class_<Obstacle>(module, "Obstacle", "Why a target cannot hold a tensor exactly.")
      .def_readonly("tensor", &Obstacle::tensor,
                    "State_dict key; '' when it is the model that has no place in the format.")
      .def_readonly("grid", &Obstacle::grid, "Name of its grid.")
      .def_readonly("reason", &Obstacle::reason, "In words.")
      .def("__repr__", [](const Obstacle& obstacle) {
        return obstacle.tensor + " (" + obstacle.grid + "): " + obstacle.reason;
      });
  module.def("can_export", &obstacles, py::arg("checkpoint"), py::arg("target"), py::kw_only(),
             py::arg("dtype") = "", py::arg("require_exact") = false,
             R"(Can the target hold the checkpoint with exactly its numbers?

Args:
    checkpoint: what `freeze` or `load` returned.
    target: one of `export_targets()`.
    dtype, require_exact: as `export` takes them.

Returns:
    Every tensor in the way as an `Obstacle`; empty when there is none.

Raises:
    ArgumentError: unknown target, or a checkpoint that is incomplete.)");
  py::class_<FileTensor>(module, "FileTensor", "One tensor of an exported file.")
      .def_readonly("name", &FileTensor::name, "In the file.")
      .def_readonly(
          "key", &FileTensor::key,
          "State_dict key of the tensor that it is, or is a part of; the name again for what is derived.")
      .def_readonly("type", &FileTensor::type, "The file's own name of its type: 'Q4_0', 'U8', ...")
      .def_readonly("shape", &FileTensor::shape, "In torch's order.")
      .def_readonly("bytes", &FileTensor::bytes, "Without padding.");
  module.def("outline", &outline_of, py::arg("tensors"), py::arg("policy"), py::arg("dtype"),
             py::arg("config") = "",
             R"(The checkpoint of a model that is not in memory: shapes, and no numbers.

Args:
    tensors: as `Policy.resolve` takes them, names with their trailing ".weight"; those of kind "other" stay float.
    policy: what is on which grid.
    dtype: torch dtype of what stays float.
    config: the model's configuration as JSON.

Errors as `Policy.resolve`; ArgumentError for a name given twice.)");
  module.def("plan_export", &plan, py::arg("checkpoint"), py::arg("target"), py::arg("dtype") = "bfloat16",
             R"(What `export` would write, from shapes alone: the checkpoint may come from `outline`.

Args:
    checkpoint: with or without numbers.
    target: one of `export_targets()`.
    dtype: of the folders' unquantized tensors.

Returns:
    (FileTensor of each tensor, Obstacle of each that the target refuses). A tensor on a grid of another consumer is
    planned on the target's first grid for it.

Raises:
    ArgumentError: unknown target or dtype, or a model that is incomplete.)");
  module.def("left_out", &left_out, py::arg("checkpoint"), py::arg("target"),
             R"(Static activation scales that the target has no place for, so that its files lack them.

What the consumer does with activations is then its own affair. ArgumentError for an unknown target.)");
  module.def(
      "cautions", &cautions, py::arg("checkpoint"), py::arg("target"),
      R"(What to know of a file before it is written, as Obstacles, by the first tensor that each concerns.

Tensors that the target's format holds exactly, and that a consumer, in the version that libqat is tested with, does
not open by itself; and experts that stay float because the format has no place for packed ones. They are written all
the same. ArgumentError for an unknown target and for a checkpoint that is incomplete.)");
  module.def("import_checkpoint", &read, py::arg("path"),
             R"(Reads an exported file or folder, or a checkpoint file, as a checkpoint.

The codes and scales are exactly those of the file, so that training can take them up again; the configuration
is kept, and the tokenizer that the file holds.

Raises:
    UnsupportedError: a kind of file that holds no codes or cannot be read back.
    FileError: a malformed file; the message names file and tensor.)");
  module.def("export_targets", &export_targets, "The targets that `export` knows.");
  module.def("export_checkpoint", &write, py::arg("checkpoint"), py::arg("path"), py::kw_only(),
             py::arg("target"), py::arg("tokenizer_from"), py::arg("name"), py::arg("progress"),
             py::arg("dtype"), py::arg("max_shard_bytes"), py::arg("require_exact"), py::arg("overwrite"),
             "The writer behind `libqat.export`.");

  py::class_<Requantization>(
      module, "Requantization",
      "What becomes of one tensor that is dequantized, written in a float type and quantized "
      "again by its grid's own rule.")
      .def_readonly("tensor", &Requantization::tensor, "State_dict key.")
      .def_readonly("grid", &Requantization::grid, "Name of its grid.")
      .def_readonly("blocks", &Requantization::blocks, "Groups of weights that share their scales.")
      .def_readonly("changed_blocks", &Requantization::changed_blocks,
                    "Blocks whose codes or stored scales come out differently.")
      .def_readonly("weights", &Requantization::weights, "How many weights it has.")
      .def_readonly("rounded_weights", &Requantization::rounded_weights,
                    "Weights that the float type does not hold exactly.")
      .def_property_readonly("exact", &Requantization::exact, "Whether no block changes.")
      .def("__repr__", [](const Requantization& row) {
        return row.tensor + " (" + row.grid + "): " + std::to_string(row.changed_blocks) + " of " +
               std::to_string(row.blocks) + " blocks change";
      });
  module.def("requantization_report", &requantize, py::arg("checkpoint"), py::arg("dtype") = "float32",
             R"(Does quantizing the dequantized weights again give back the trained codes and scales?

Programs that take float weights and quantize them by themselves find each block's scale from its weights. They
find the trained one only if, for example, a Q4_0 block uses its code -8.

Args:
    checkpoint: what `freeze` or `load` returned.
    dtype: "float32", "float16" or "bfloat16": the type in which the weights are handed over.

Returns:
    One `Requantization` for each quantized tensor, by key.

Raises:
    ArgumentError: another dtype.
    NumericError: a weight beyond the dtype's range; the message names tensor and row.)");
  module.def(
      "verify", &compare, py::arg("path"), py::arg("checkpoint"),
      R"(Reads an exported file or folder (or a checkpoint file) by its consumer's rule, and compares it bit for bit.

Returns:
    A list of `Difference`; empty when the file holds exactly the checkpoint's numbers.)");
}

}  // namespace qat::python
