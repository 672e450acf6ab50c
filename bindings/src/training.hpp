#pragma once

// What the bindings of training share.

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "callables.hpp"
#include "qat/train/language_model.hpp"
#include "qat/train/options.hpp"

namespace qat::python {

/// ArgumentError naming an unknown or illegal option.
train::Options options_of(const pybind11::dict& options);

/// A Decoder in halves, any other callable by its logits, None as no model. See logits_function.
train::LanguageModel language_model(const pybind11::object& model, const std::string& argument);

/// Calls Python from within work that has released the GIL. An exception, also that of Ctrl-C, ends the work
/// and is raised afterwards by `rethrow`.
class Reporter {
 public:
  explicit Reporter(const pybind11::object& function) : function_(function) {}

  /// False when the work should stop.
  template <class Report>
  bool operator()(const Report& report) {
    const pybind11::gil_scoped_acquire locked;
    try {
      if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
      if (function_.is_none()) return true;
      return !function_(report).is(pybind11::handle(Py_False));
    } catch (pybind11::error_already_set& error) {
      pending_ = std::move(error);
      return false;
    }
  }
  void rethrow() {
    if (pending_) throw std::move(*pending_);
  }

 private:
  const pybind11::object& function_;
  std::optional<pybind11::error_already_set> pending_;
};

}  // namespace qat::python
