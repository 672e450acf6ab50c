#pragma once

// Slots and the module's registry, as the parts of this folder share them.

#include "qat/prepare/prepare.hpp"

namespace qat::detail {

/// The registry of a module's own parameters, which LibTorch lets only derived classes change.
struct Registry : torch::nn::Module {
  static auto& of(torch::nn::Module& module) { return module.*(&Registry::parameters_); }
};

/// Joins slots whose `get` returns the same tensor: the first stays, later names become its aliases, and what
/// is set or bound reaches all of them. ArgumentError for slots without functions and for a name given twice.
std::vector<Slot> merged(std::vector<Slot> slots);

/// ArgumentError ("function: name: ...") when a QuantizedScope holds the slot at present.
void expect_no_scope(const char* function, const Slot& slot);

}  // namespace qat::detail
