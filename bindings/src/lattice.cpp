#include "qat/ptq/lattice.hpp"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "callables.hpp"
#include "module.hpp"
#include "qat/prepare/take_up.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

void bind_results(py::module_& module) {
  using ptq::Lattice;
  py::class_<Lattice>(module, "Lattice", "The lattice that a tensor's weights lie on; see `libqat.lattice`.")
      .def_readonly("scales", &Lattice::scales, "float32 [R, G, 1], as learned scales.")
      .def_property_readonly(
          "rule", [](const Lattice& found) { return to_string(found.rule); },
          "'consumer': the grid's own rule gives the scales; 'fitted': they were found by fitting; 'none': "
          "most "
          "blocks lie on no lattice of this grid, and scales are by the rule.")
      .def_readonly("blocks", &Lattice::blocks, "Blocks in all.")
      .def_readonly("exact", &Lattice::exact,
                    "Blocks whose weights are exactly code * scale, rounded to the file's type.")
      .def_readonly("worst", &Lattice::worst,
                    "The largest error of a weight in the other blocks, in steps of its scale.")
      .def("__repr__", [](const Lattice& found) {
        return "Lattice(rule='" + std::string(to_string(found.rule)) +
               "', exact=" + std::to_string(found.exact) + " of " + std::to_string(found.blocks) +
               ", worst=" + std::to_string(found.worst) + ")";
      });
}

}  // namespace

void bind_lattice(py::module_& module) {
  bind_results(module);
  module.def("has_lattice", &ptq::has_lattice, py::arg("grid"),
             "Whether the grid has one scale per block and levels code * scale around 0.");
  module.def("find_lattice", &ptq::find_lattice, py::arg("weight"), py::arg("grid"), py::arg("tensor") = "",
             py::call_guard<py::gil_scoped_release>(),
             R"(The scales for which a tensor's weights are whole steps of a grid, as a Lattice.

weight: float32 [R, ...] with values of a narrower type, the narrowest of bfloat16, float16 and float32 that holds
them all: its products are rounded to that type. ArgumentError for a grid without a lattice; NumericError for
weights that are not finite.)");
  module.def(
      "apply_lattice",
      [](PreparedDecoder& prepared, const py::object& progress) {
        const auto report = [&](int64_t done, int64_t total, const std::string& tensor) {
          const py::gil_scoped_acquire locked;
          if (PyErr_CheckSignals() != 0) throw py::error_already_set();
          if (!progress.is_none()) progress(done, total, tensor);
        };
        std::vector<ptq::LatticeTensor> found;
        {
          const py::gil_scoped_release unlocked;
          found = ptq::apply_lattice(prepared.model, report);
        }
        std::vector<std::tuple<std::string, std::string, ptq::Lattice>> result;
        for (ptq::LatticeTensor& one : found) {
          result.emplace_back(one.name, one.grid, std::move(one.lattice));
        }
        return result;
      },
      py::arg("prepared"), py::arg("progress") = py::none(),
      "(name, grid, Lattice) of each tensor of a prepared decoder; use `libqat.lattice`.");
  module.def(
      "take_up",
      [](PreparedDecoder& prepared, const QuantizedCheckpoint& checkpoint) {
        take_up(prepared.model, checkpoint);
      },
      py::arg("prepared"), py::arg("checkpoint"), py::call_guard<py::gil_scoped_release>(),
      "A checkpoint's numbers as those of a prepared decoder; use `libqat.take_up`.");
}

}  // namespace qat::python
