#pragma once

// One `bind_<topic>` per source file. Docstrings give shapes, dtypes and errors; long work releases the GIL.

#include <pybind11/pybind11.h>

namespace qat::python {

void bind_errors(pybind11::module_& module);
void bind_grid(pybind11::module_& module);
void bind_grid_training(pybind11::module_& module);
void bind_policy(pybind11::module_& module);
void bind_checkpoint(pybind11::module_& module);
void bind_io(pybind11::module_& module);
void bind_export(pybind11::module_& module);
void bind_lattice(pybind11::module_& module);
void bind_models(pybind11::module_& module);
void bind_prepare(pybind11::module_& module);
void bind_ptq(pybind11::module_& module);
void bind_ptq_results(pybind11::module_& module);
void bind_eval(pybind11::module_& module);
void bind_bootstrap(pybind11::module_& module);
void bind_choices(pybind11::module_& module);
void bind_teacher(pybind11::module_& module);
void bind_train(pybind11::module_& module);

}  // namespace qat::python
