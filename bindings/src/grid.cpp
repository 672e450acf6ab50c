#include "module.hpp"

#include <pybind11/stl.h>

namespace qat::python {

void bind_grid(pybind11::module_&) {}

}  // namespace qat::python
