#include "qat/policy/policy.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <tuple>

#include "module.hpp"
#include "qat/core/error.hpp"
#include "qat/policy/recipe.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using Path = std::filesystem::path;

using Tensors = std::vector<std::tuple<std::string, std::string, std::vector<int64_t>>>;

std::vector<Target> targets_of(const Tensors& tensors) {
  std::vector<Target> targets;
  for (const auto& [name, kind, shape] : tensors) targets.push_back({name, slot_kind(kind), shape});
  return targets;
}

std::vector<std::string> resolve(const Policy& policy, const Tensors& tensors) {
  std::vector<std::string> grids;
  for (const Scheme& scheme : policy.resolve(targets_of(tensors))) grids.push_back(scheme.weight);
  return grids;
}

/// (input, output) of each tensor.
std::vector<std::pair<std::string, std::string>> activations(const Policy& policy, const Tensors& tensors) {
  std::vector<std::pair<std::string, std::string>> formats;
  for (Activations& one : policy.activations(targets_of(tensors))) {
    formats.emplace_back(std::move(one.input), std::move(one.output));
  }
  return formats;
}

Estimator estimator_of(const std::string& kind, const std::string& scale, const std::string& gradient) {
  Estimator estimator{EstimatorKind::kSte, scale_rule(scale.empty() ? "reference" : scale),
                      scale_gradient(gradient)};
  if (kind == "lsq" || kind == "seq") {
    const ScaleRule rule = kind == "lsq" ? ScaleRule::kLearned : ScaleRule::kSeq;
    if (!scale.empty() && estimator.scale != rule) {
      throw ArgumentError("estimator: " + kind + ": expected the scale rule " + std::string(to_string(rule)) +
                          ", or none, got \"" + scale + "\"");
    }
    return {EstimatorKind::kClippedSte, rule, estimator.scale_gradient};
  }
  estimator.kind = estimator_kind(kind);
  return estimator;
}

void bind_estimator(py::module_& module) {
  py::class_<Estimator>(module, "Estimator",
                        "How the gradient of one weight passes the rounding, and where its scales come from.")
      .def(py::init(&estimator_of), py::arg("kind") = "ste", py::arg("scale") = "",
           py::arg("scale_gradient") = "lsq",
           R"(An estimator from the words of a policy; see docs/policy.md.

Args:
    kind: "ste", "clipped_ste", "trust_mask", "stable_qat"; "lsq": clipped_ste with learned scales; "seq":
        clipped_ste with the scale "seq".
    scale: "reference" (the default), "search", "differentiated", "learned", or "seq": learned, and tied to
        ParetoQ's balanced levels.
    scale_gradient: "lsq", "tensor" or "plain": what the gradient of learned scales is multiplied with.

ArgumentError lists the legal names.)")
      .def_property_readonly(
          "kind", [](const Estimator& estimator) { return to_string(estimator.kind); },
          "'ste', 'clipped_ste', 'trust_mask' or 'stable_qat'.")
      .def_property_readonly(
          "scale", [](const Estimator& estimator) { return to_string(estimator.scale); },
          "'reference', 'search', 'differentiated', 'learned' or 'seq'.")
      .def_property_readonly(
          "scale_gradient", [](const Estimator& estimator) { return to_string(estimator.scale_gradient); },
          "'lsq', 'tensor' or 'plain'.")
      .def(
          "__eq__", [](const Estimator& one, const Estimator& two) { return one == two; }, py::is_operator())
      .def("__hash__",
           [](const Estimator& estimator) {
             return py::hash(py::make_tuple(to_string(estimator.kind), to_string(estimator.scale),
                                            to_string(estimator.scale_gradient)));
           })
      .def("__repr__", [](const Estimator& estimator) {
        return "Estimator('" + std::string(to_string(estimator.kind)) + "', '" +
               std::string(to_string(estimator.scale)) + "', '" +
               std::string(to_string(estimator.scale_gradient)) + "')";
      });
}

void bind_recipe(py::module_& module) {
  py::class_<Recipe>(module, "Recipe", "How to train on a policy's grids; see `recommended`.")
      .def_readonly("policy", &Recipe::policy, "The policy, with the estimator that its rules train with.")
      .def_readonly("start", &Recipe::start,
                    "'guided', 'gptq': at that PTQ method's solution; 'none': at the model as it is.")
      .def_readonly("start_tokens", &Recipe::start_tokens, "Tokens that a start looks at, at most.")
      .def_readonly("start_generated", &Recipe::start_generated,
                    "Share of them that the float model writes itself, see `libqat.generate`.")
      .def_readonly("learning_rate", &Recipe::learning_rate, "Of the latents.")
      .def_readonly("scale_learning_rate", &Recipe::scale_learning_rate,
                    "Of learned scales, relative to their size.")
      .def_readonly("final_learning_rate", &Recipe::final_learning_rate,
                    "The share of the peak at which the cosine ends.");
  module.def("recommended", &recommended, py::arg("policy"),
             R"(The settings that came out best for the policy's grids, see docs/quality.md.

`libqat.finetune.start` and `libqat finetune` use them for what they are not told. A policy of the user's own that
names an estimator keeps it, and starts from "none" unless its scales are learned.)");
}

}  // namespace

void bind_policy(py::module_& module) {
  bind_estimator(module);
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
      .def(
          "estimators",
          [](const Policy& policy, const Tensors& tensors) { return policy.estimators(targets_of(tensors)); },
          py::arg("tensors"),
          "One Estimator per tensor, parallel to `resolve`: its rule's own, or the policy's.")
      .def(
          "activations", &activations, py::arg("tensors"),
          R"((input, output) of each tensor, parallel to `resolve`: how the product with it rounds activations.

Formats of `libqat.ops.fake_quantize_activation`, "" where nothing is rounded.)")
      .def_property_readonly(
          "kv_cache", [](const Policy& policy) { return policy.kv_cache(); },
          "Format of the keys and values that attention keeps; '' for as they are.")
      .def_property_readonly(
          "activation_scales",
          [](const Policy& policy) {
            const ActivationScales& scales = policy.activation_scales();
            return std::pair(to_string(scales.rule), scales.batches);
          },
          "How static activation scales are found: ('observed' or 'learned', batches of calibration).")
      .def_property_readonly("name", &Policy::name, "Preset name or file path; '' when built from JSON.")
      .def_property_readonly(
          "estimator", [](const Policy& policy) { return to_string(policy.estimator().kind); },
          "How gradients pass through the rounding, where a rule does not say otherwise: see Estimator.")
      .def_property_readonly(
          "scale", [](const Policy& policy) { return to_string(policy.estimator().scale); },
          "Where scales come from, where a rule does not say otherwise: see Estimator.")
      .def(
          "with_scale",
          [](const Policy& policy, const std::string& scale) { return policy.with_scale(scale_rule(scale)); },
          py::arg("scale"), "The same policy with that scale rule, in its rules' own estimators too.")
      .def("with_estimator", &Policy::with_estimator, py::arg("estimator"),
           "The same policy with that Estimator for every rule; rules lose their own.")
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
  bind_recipe(module);
}

}  // namespace qat::python
