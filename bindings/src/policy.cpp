#include "qat/policy/policy.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <tuple>

#include "module.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using Path = std::filesystem::path;

std::vector<std::string> resolve(
    const Policy& policy,
    const std::vector<std::tuple<std::string, std::string, std::vector<int64_t>>>& tensors) {
  std::vector<Target> targets;
  for (const auto& [name, kind, shape] : tensors) targets.push_back({name, slot_kind(kind), shape});
  std::vector<std::string> grids;
  for (const Scheme& scheme : policy.resolve(targets)) grids.push_back(scheme.weight);
  return grids;
}

}  // namespace

void bind_policy(py::module_& module) {
  py::class_<Policy>(module, "Policy",
                     "Which tensor goes to which grid: ordered rules, first match wins. See docs/policy.md.")
      .def_static("from_json", &Policy::from_json, py::arg("json"),
                  "A policy from JSON text. ArgumentError naming the JSON path of whatever is wrong.")
      .def_static(
          "from_file", [](const Path& path) { return Policy::from_file(path.string()); }, py::arg("path"),
          "A policy from a JSON file. FileError when it cannot be read.")
      .def_static("preset", &Policy::preset, py::arg("name"),
                  "A policy that ships with libqat, see `presets`. ArgumentError lists the names.")
      .def_static("load", &Policy::load, py::arg("name_or_path"),
                  "A preset by name, or a file: anything that contains '/' or ends in '.json'.")
      .def_static("presets", &Policy::presets, "The names of all presets.")
      .def_static("preset_summary", &Policy::preset_summary, py::arg("name"),
                  "What a preset is for, in a line. ArgumentError lists the names.")
      .def("to_json", &Policy::to_json,
           "Canonical JSON: sorted keys, defaults left out. from_json(to_json()) is the same policy.")
      .def("resolve", &resolve, py::arg("tensors"),
           R"(One grid per tensor, "f32" where no rule matches.

Args:
    tensors: (parameter name, "linear" | "embedding" | "conv" | "other", shape) of each; a row is everything
        after dimension 0.

ArgumentError for a rule that matches nothing and is not optional, and for a width that the grid's block does
not divide, naming the tensor.)")
      .def_property_readonly("name", &Policy::name, "Preset name or file path; '' when built from JSON.")
      .def_property_readonly(
          "estimator", [](const Policy& policy) { return to_string(policy.estimator().kind); },
          "How gradients pass through the rounding: 'ste' or 'clipped_ste'.")
      .def_property_readonly(
          "scale", [](const Policy& policy) { return to_string(policy.estimator().scale); },
          "Where scales come from: 'reference', the consumer's own rule, or 'search', the least error.")
      .def(
          "with_scale",
          [](const Policy& policy, const std::string& scale) { return policy.with_scale(scale_rule(scale)); },
          py::arg("scale"), "The same policy with that scale rule: 'reference' or 'search'.")
      .def(
          "__eq__", [](const Policy& one, const Policy& two) { return one.to_json() == two.to_json(); },
          py::is_operator())
      .def("__hash__", [](const Policy& policy) { return py::hash(py::str(policy.to_json())); })
      .def("__repr__",
           [](const Policy& policy) {
             return "Policy.from_json(" + py::repr(py::str(policy.to_json())).cast<std::string>() + ")";
           })
      .def(py::pickle([](const Policy& policy) { return policy.to_json(); },
                      [](const std::string& json) { return Policy::from_json(json); }));
}

}  // namespace qat::python
