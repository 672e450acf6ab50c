#pragma once

// Decoders and Python functions as the library's callables.

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "qat/eval/eval.hpp"
#include "qat/models/decoder.hpp"
#include "qat/prepare/prepare.hpp"

namespace qat::python {

/// libqat's decoder with a policy attached; its parameters are the latents.
struct PreparedDecoder {
  std::shared_ptr<models::Decoder> decoder;
  PreparedModel model;
};

/// tokens -> logits of a Decoder, a PreparedDecoder (quantized), or a Python function of an int64[B, T]
/// tensor. C++ models run without the GIL; a Python function takes it for each call, from whatever thread.
/// ArgumentError naming `argument` for anything else. Needs the GIL; so does destroying the result of a
/// Python function, which takes it.
eval::LogitsFunction logits_function(const pybind11::object& model, const std::string& argument);

}  // namespace qat::python
