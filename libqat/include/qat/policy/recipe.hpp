#pragma once

// How to train on a policy's grids when its user does not say. The settings are those that came out best in
// the experiments of docs/quality.md.

#include <cstdint>
#include <string>

#include "qat/policy/policy.hpp"

namespace qat {

/// Settings of a run, by the names they have everywhere else.
struct Recipe {
  /// The policy, with an estimator of its own for each rule.
  Policy policy;
  /// Where the run starts: at the solution of "gptq" (ptq::apply_gptq) or "guided" (the same with
  /// ptq::token_sensitivity and coordinate descent), or "none", at the model as it is.
  std::string start = "none";
  /// Tokens that a start looks at, at most, ...
  int64_t start_tokens = 102400;
  /// ... and which share of them the float model writes itself (models::generate), instead of the run's text.
  double start_generated = 0.5;
  // As in train::Options, whose defaults they are for "none".
  double learning_rate = 1e-4;
  double scale_learning_rate = 1e-3;
  double final_learning_rate = 0.05;
};

/// What is recommended for the grids of `policy`, decided by the fewest bits among its integer grids: learned
/// scales that start at a PTQ solution. A policy of the user's own that names an estimator keeps it, and
/// starts from "none" unless its scales are learned; so does a policy without integer grids.
Recipe recommended(const Policy& policy);

}  // namespace qat
