#pragma once

// Which tensor goes to which grid: ordered rules, first match wins.
//
//   {"rules": [{"match": "model\\.layers\\.\\d+\\..*_proj", "weight": "q4_0"},
//              {"match": "lm_head", "weight": "q8_0", "optional": true}],
//    "estimator": {"kind": "ste", "scale": "search"}}
//
// A rule may have an "estimator" of its own; the policy's serves the others. {"kind": "lsq"} is short for
// {"kind": "clipped_ste", "scale": "learned"}, {"kind": "seq"} for {"kind": "clipped_ste", "scale": "seq"}.
//
// A rule may also say how activations are rounded, by the names of qat/core/activation.hpp: "input", what
// goes into the product with the weight, and "output", what comes out. "kv_cache" of the policy is the format
// of the keys and values that attention keeps, "activation_scales" how static scales are found.
//
// `match` is an ECMAScript regular expression that must match the whole parameter name without its trailing
// ".weight". `kind` ("linear", "embedding", "conv") narrows a rule to one kind of layer. Tensors that no rule
// matches stay float. Unknown keys, unknown grids and bad expressions are errors that name the JSON path.

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "qat/core/activation.hpp"
#include "qat/core/scheme.hpp"

namespace qat {

/// One quantizable tensor, as a policy sees it.
struct Target {
  std::string name;  ///< parameter name; a trailing ".weight" is ignored for matching
  SlotKind kind = SlotKind::kLinear;
  std::vector<int64_t> shape;  ///< [R, ...]; a row is everything after dimension 0
};

/// One line of a policy.
struct Rule {
  std::string match;                        ///< ECMAScript expression, full match
  std::optional<SlotKind> kind;             ///< JSON `kind`, optional
  Scheme scheme;                            ///< JSON `weight`: grid name; "f32" keeps the tensor float
  bool optional = false;                    ///< a rule that matches nothing is an error unless optional
  std::optional<Estimator> estimator = {};  ///< JSON `estimator`; nothing: the policy's
  Activations activations = {};             ///< JSON `input`, `output`: formats of activations
};

/// Ordered rules, first match wins, and the estimator that they train with. Immutable.
class Policy {
 public:
  /// Throws ArgumentError naming the JSON path ("policy: rules[2].weight: ...").
  static Policy from_json(std::string_view json);
  /// The same, each message naming the file as well; FileError when it cannot be read.
  static Policy from_file(const std::string& path);
  /// One of `presets()`. ArgumentError lists the names.
  static Policy preset(std::string_view name);
  /// A preset name, or the path of a JSON file (anything that contains '/' or ends in ".json").
  static Policy load(const std::string& name_or_path);
  /// The names that `preset` takes.
  static std::vector<std::string_view> presets();
  /// What a preset is for, in a line. ArgumentError lists the names.
  static std::string_view preset_summary(std::string_view name);

  /// Canonical JSON (sorted keys, defaults left out): from_json(to_json()) is the same policy.
  std::string to_json() const;
  /// Preset name or file path; "" when built from JSON.
  const std::string& name() const noexcept { return name_; }
  const std::vector<Rule>& rules() const noexcept { return rules_; }
  const Estimator& estimator() const noexcept { return estimator_; }
  /// "int8_tensor_static": attention keeps keys and values in 8 bits, with one scale each per layer. "": as
  /// they are.
  const std::string& kv_cache() const noexcept { return kv_cache_; }
  /// How static activation scales are found, those of the KV cache too.
  const ActivationScales& activation_scales() const noexcept { return activation_scales_; }
  /// The same policy with another scale rule, in its rules' own estimators too.
  Policy with_scale(ScaleRule scale) const;
  /// The same policy with this estimator for every rule; rules lose their own.
  Policy with_estimator(const Estimator& estimator) const;

  /// One scheme per target, in order; "f32" where no rule matched. Throws ArgumentError for a rule that is
  /// not optional and was the first to match no tensor, and for a width that the grid's block does not divide
  /// (naming the tensor). Integer grids need 2 or more dimensions.
  std::vector<Scheme> resolve(const std::vector<Target>& targets) const;
  /// Parallel to `resolve`, with its errors: how each target is trained. The policy's where no rule matched.
  /// Also throws ArgumentError for a differentiated scale on a grid whose scale rule has no gradient, and for
  /// kSeq on a grid with scales that cannot hold SEQ, naming the tensor and the grids that can.
  std::vector<Estimator> estimators(const std::vector<Target>& targets) const;

  /// Parallel to `resolve`, with its errors: how the product with each weight rounds activations. Of a table
  /// they concern the head that is tied to it.
  std::vector<Activations> activations(const std::vector<Target>& targets) const;

 private:
  /// `where` starts each message.
  static Policy parse(std::string_view json, std::string name, const std::string& where);
  /// The first rule that matches each target; null where none does. Throws as `resolve` does.
  std::vector<const Rule*> matches(const std::vector<Target>& targets) const;

  std::string name_;
  std::vector<Rule> rules_;
  Estimator estimator_;
  std::string kv_cache_;
  ActivationScales activation_scales_;
};

}  // namespace qat
