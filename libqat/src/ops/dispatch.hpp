#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace qat::ops {

/// The operator `name` ("libqat::...") as a typed callable. Keep it in a function-local static.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

}  // namespace qat::ops
