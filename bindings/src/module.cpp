#include "module.hpp"

#include "qat/version.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled part of libqat. Use the names in `libqat`; this module is its implementation.";
  // Of the libqat.so in this process, which need not be the one that was built with this extension.
  module.attr("__version__") = qat::version();
  qat::python::bind_errors(module);
  qat::python::bind_grid(module);
  qat::python::bind_grid_training(module);
  qat::python::bind_io(module);
  qat::python::bind_policy(module);
  qat::python::bind_checkpoint(module);
  qat::python::bind_export(module);
  qat::python::bind_models(module);
  qat::python::bind_prepare(module);
  qat::python::bind_ptq_results(module);
  qat::python::bind_ptq(module);
  qat::python::bind_lattice(module);
  qat::python::bind_eval(module);
  qat::python::bind_bootstrap(module);
  qat::python::bind_choices(module);
  qat::python::bind_train(module);
  qat::python::bind_teacher(module);
}
