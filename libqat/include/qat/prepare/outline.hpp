#pragma once

// A policy applied to a model that is not in memory.

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/policy/policy.hpp"

namespace qat {

/// What `freeze` would give for a model of these tensors, without numbers: every tensor is on the device
/// "meta". `tensors`: names with their trailing ".weight", and whole shapes ([E, O, I] for a stack of
/// experts); those of kind kOther are no slots and stay float. `floats`: the type of what the policy leaves
/// float. `config`: see QuantizedCheckpoint. Errors: those of `Policy::resolve`, and ArgumentError for a name
/// given twice.
QuantizedCheckpoint outline(const std::vector<Target>& tensors, const Policy& policy,
                            at::ScalarType floats = at::kBFloat16, std::string config = "");

}  // namespace qat
