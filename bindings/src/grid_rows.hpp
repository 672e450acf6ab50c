#pragma once

// Matrices of weights and their scales between Python and the grids, row by row.

#include <pybind11/numpy.h>

#include <string>
#include <vector>

#include "module.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"

namespace qat::python {

namespace py = pybind11;

using Floats = py::array_t<float, py::array::c_style>;
using Codes = py::array_t<int8_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Halves = py::array_t<uint16_t, py::array::c_style>;

/// Rows of one call: `grid`, `rows` of `n` weights, and what one row has of scale parameters.
struct Rows {
  const grid::Grid& grid;
  int64_t rows;
  int64_t n;
  int64_t blocks;
  int64_t params;

  int64_t scales() const { return blocks * params; }
};

[[noreturn]] inline void refuse(const char* function, const std::string& expected, const std::string& got) {
  throw ArgumentError("grid." + std::string(function) + ": expected " + expected + ", got " + got);
}

inline std::string shape_text(const py::array& array) {
  std::string text = "[";
  for (py::ssize_t d = 0; d < array.ndim(); ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(array.shape(d));
  }
  return text + "]";
}

inline Rows rows_of(const char* function, const std::string& name, int64_t rows, int64_t n) {
  const grid::Grid& grid = grid::find(name);
  if (!grid.divides(n)) {
    refuse(function, "rows of a multiple of " + std::to_string(grid.block(n)) + " weights for " + name,
           std::to_string(n));
  }
  return {grid, rows, n, grid.blocks(n), grid.params()};
}

inline Rows rows_of(const char* function, const std::string& name, const py::array& matrix) {
  if (matrix.ndim() != 2) refuse(function, "a matrix [rows, n]", "shape " + shape_text(matrix));
  return rows_of(function, name, matrix.shape(0), matrix.shape(1));
}

inline void check_scales(const char* function, const Rows& rows, const Floats& scales) {
  if (scales.ndim() == 3 && scales.shape(0) == rows.rows && scales.shape(1) == rows.blocks &&
      scales.shape(2) == rows.params) {
    return;
  }
  refuse(function,
         "scales [" + std::to_string(rows.rows) + ", " + std::to_string(rows.blocks) + ", " +
             std::to_string(rows.params) + "]",
         shape_text(scales));
}

inline Floats make_scales(const Rows& rows) {
  return Floats(std::vector<py::ssize_t>{rows.rows, rows.blocks, rows.params});
}

template <class Array>
Array make_matrix(int64_t rows, int64_t columns) {
  return Array(std::vector<py::ssize_t>{rows, columns});
}

/// Calls one(row) for every row without the GIL; the first failing row is an error that names it.
template <class One>
void for_rows(const char* function, const Rows& rows, One one) {
  const py::gil_scoped_release release;
  for (int64_t r = 0; r < rows.rows; ++r) {
    const grid::Status status = one(r);
    if (status == grid::Status::kOk) continue;
    throw NumericError("grid." + std::string(function) + ": row " + std::to_string(r) +
                       ": expected values that " + std::string(rows.grid.info().name) +
                       " can hold, got one that " + std::string(grid::to_string(status)));
  }
}

}  // namespace qat::python
