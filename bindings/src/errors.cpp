#include <string_view>

#include "module.hpp"
#include "qat/core/error.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

/// A Python class `libqat.<name>` that is both a libqat.Error and the builtin a Python user would catch.
void define(py::module_& module, const char* name, py::handle error, PyObject* builtin, const char* doc) {
  py::object bases = builtin == nullptr
                         ? py::object(py::make_tuple(py::reinterpret_borrow<py::object>(PyExc_Exception)))
                         : py::object(py::make_tuple(error, py::reinterpret_borrow<py::object>(builtin)));
  const std::string qualified = std::string("libqat.") + name;
  module.attr(name) = py::reinterpret_steal<py::object>(
      PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases.ptr(), nullptr));
}

/// The Python class for a C++ exception: the most derived one first.
const char* python_name(const Error& error) {
  if (dynamic_cast<const ArgumentError*>(&error) != nullptr) return "ArgumentError";
  if (dynamic_cast<const FileError*>(&error) != nullptr) return "FileError";
  if (dynamic_cast<const UnsupportedError*>(&error) != nullptr) return "UnsupportedError";
  if (dynamic_cast<const NumericError*>(&error) != nullptr) return "NumericError";
  return "Error";
}

}  // namespace

void bind_errors(py::module_& module) {
  define(module, "Error", {}, nullptr, "Base of every exception that libqat raises on purpose.");
  const py::object error = module.attr("Error");
  define(module, "ArgumentError", error, PyExc_ValueError, "A bad argument, policy or configuration.");
  define(module, "FileError", error, PyExc_OSError,
         "A file that cannot be read, is malformed, or cannot be written.");
  define(module, "UnsupportedError", error, PyExc_NotImplementedError,
         "Legal input that cannot be represented.");
  define(module, "NumericError", error, PyExc_ArithmeticError, "A value that has no place on a grid.");

  static py::handle core = module;
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& caught) {
      // A message may quote bytes of a broken file that are no UTF-8.
      const std::string_view text = caught.what();
      const auto message = py::reinterpret_steal<py::object>(
          PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
      PyErr_SetObject(core.attr(python_name(caught)).ptr(), message.ptr());
    }
  });
}

}  // namespace qat::python
