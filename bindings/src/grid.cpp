#include "qat/grid/grid.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "module.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/ggml.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

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

[[noreturn]] void refuse(const char* function, const std::string& expected, const std::string& got) {
  throw ArgumentError("grid." + std::string(function) + ": expected " + expected + ", got " + got);
}

std::string shape_text(const py::array& array) {
  std::string text = "[";
  for (py::ssize_t d = 0; d < array.ndim(); ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(array.shape(d));
  }
  return text + "]";
}

Rows rows_of(const char* function, const std::string& name, int64_t rows, int64_t n) {
  const grid::Grid& grid = grid::find(name);
  if (!grid.divides(n)) {
    refuse(function, "rows of a multiple of " + std::to_string(grid.block(n)) + " weights for " + name,
           std::to_string(n));
  }
  return {grid, rows, n, grid.blocks(n), grid.params()};
}

Rows rows_of(const char* function, const std::string& name, const py::array& matrix) {
  if (matrix.ndim() != 2) refuse(function, "a matrix [rows, n]", "shape " + shape_text(matrix));
  return rows_of(function, name, matrix.shape(0), matrix.shape(1));
}

void check_scales(const char* function, const Rows& rows, const Floats& scales) {
  if (scales.ndim() == 3 && scales.shape(0) == rows.rows && scales.shape(1) == rows.blocks &&
      scales.shape(2) == rows.params) {
    return;
  }
  refuse(function,
         "scales [" + std::to_string(rows.rows) + ", " + std::to_string(rows.blocks) + ", " +
             std::to_string(rows.params) + "]",
         shape_text(scales));
}

void check_like(const char* function, const Floats& w, const Floats& g) {
  if (g.ndim() == 2 && g.shape(0) == w.shape(0) && g.shape(1) == w.shape(1)) return;
  refuse(function, "gradients like the weights, " + shape_text(w), shape_text(g));
}

Floats make_scales(const Rows& rows) {
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

py::dict grid_info(const std::string& name) {
  const grid::Info& info = grid::find(name).info();
  const auto dtype_name = [](grid::DType dtype) {
    switch (dtype) {
      case grid::DType::kF32:
        return "float32";
      case grid::DType::kF16:
        return "float16";
      case grid::DType::kBF16:
        return "bfloat16";
      case grid::DType::kU8:
        return "uint8";
      case grid::DType::kI8:
        return "int8";
      case grid::DType::kE8M0:
        return "float8_e8m0fnu";
      case grid::DType::kE4M3:
        return "float8_e4m3fn";
    }
    return "?";
  };
  py::list fields;
  for (const grid::Field& field : info.fields) {
    fields.append(py::make_tuple(field.name, field.count, dtype_name(field.dtype)));
  }
  py::dict dict;
  dict["name"] = info.name;
  dict["bits"] = info.bits;
  dict["block"] = info.block > 0 ? py::object(py::int_(info.block)) : py::object(py::none());
  dict["whole_tensor"] = info.block == grid::kWholeTensor;
  dict["code_min"] = info.code_min;
  dict["code_max"] = info.code_max;
  dict["fields"] = fields;
  const grid::NameOptions options = grid::name_options(name);
  const auto tuple_of = [](std::span<const std::string_view> values) {
    return py::tuple(py::cast(std::vector<std::string_view>(values.begin(), values.end())));
  };
  dict["scale_grids"] = tuple_of(options.scale_grids);
  dict["dequant_dtypes"] = tuple_of(options.dequant_dtypes);
  dict["is_float"] = info.is_float;
  dict["dtype"] = info.is_float ? py::object(py::str(dtype_name(info.dtype))) : py::object(py::none());
  return dict;
}

int64_t row_bytes(const std::string& name, int64_t n) {
  return grid::row_bytes(rows_of("row_bytes", name, 1, n).grid, n);
}

int64_t tensor_bytes(const std::string& name, int64_t rows, int64_t n) {
  return grid::tensor_bytes(rows_of("tensor_bytes", name, rows, n).grid, rows, n);
}

Floats choose(const std::string& name, const Floats& w, const std::string& scale) {
  const ScaleRule rule = scale_rule(scale);
  const Rows rows = rows_of("choose", name, w);
  Floats s = make_scales(rows);
  const float* in = w.data();
  float* out = s.mutable_data();
  for_rows("choose", rows, [&](int64_t r) {
    return rows.grid.scales(rule, in + r * rows.n, rows.n, out + r * rows.scales());
  });
  return s;
}

Floats store(const std::string& name, const Floats& s, int64_t n) {
  const Rows rows = rows_of("store", name, s.ndim() == 3 ? s.shape(0) : 0, n);
  check_scales("store", rows, s);
  Floats stored = make_scales(rows);
  const float* in = s.data();
  float* out = stored.mutable_data();
  for_rows("store", rows, [&](int64_t r) {
    return rows.grid.store(in + r * rows.scales(), rows.n, out + r * rows.scales());
  });
  return stored;
}

Codes encode(const std::string& name, const Floats& w, const Floats& s) {
  const Rows rows = rows_of("encode", name, w);
  check_scales("encode", rows, s);
  Codes codes = make_matrix<Codes>(rows.rows, rows.n);
  const float* in = w.data();
  const float* scales = s.data();
  int8_t* out = codes.mutable_data();
  for_rows("encode", rows, [&](int64_t r) {
    rows.grid.encode(in + r * rows.n, rows.n, scales + r * rows.scales(), out + r * rows.n);
    return grid::Status::kOk;
  });
  return codes;
}

Floats decode(const std::string& name, const Codes& codes, const Floats& stored) {
  const Rows rows = rows_of("decode", name, codes);
  check_scales("decode", rows, stored);
  Floats w_hat = make_matrix<Floats>(rows.rows, rows.n);
  const int8_t* in = codes.data();
  const float* scales = stored.data();
  float* out = w_hat.mutable_data();
  for_rows("decode", rows, [&](int64_t r) {
    rows.grid.decode(in + r * rows.n, rows.n, scales + r * rows.scales(), out + r * rows.n);
    return grid::Status::kOk;
  });
  return w_hat;
}

Bytes in_range(const std::string& name, const Floats& w, const Floats& s) {
  const Rows rows = rows_of("in_range", name, w);
  check_scales("in_range", rows, s);
  Bytes mask = make_matrix<Bytes>(rows.rows, rows.n);
  const float* in = w.data();
  const float* scales = s.data();
  uint8_t* out = mask.mutable_data();
  for_rows("in_range", rows, [&](int64_t r) {
    rows.grid.in_range(in + r * rows.n, rows.n, scales + r * rows.scales(), out + r * rows.n);
    return grid::Status::kOk;
  });
  return mask;
}

Floats fake_quantize(const std::string& name, const Floats& w, bool reference, const std::string& scale) {
  const ScaleRule rule = scale_rule(scale);
  Rows rows = rows_of("fake_quantize", name, w);
  const grid::Grid& grid = reference ? grid::reference(name) : rows.grid;
  Floats w_hat = make_matrix<Floats>(rows.rows, rows.n);
  const float* in = w.data();
  float* out = w_hat.mutable_data();
  for_rows("fake_quantize", rows,
           [&](int64_t r) { return grid.fake_quantize(in + r * rows.n, rows.n, out + r * rows.n, rule); });
  return w_hat;
}

Halves fake_quantize_bf16(const std::string& name, const Floats& w, bool reference,
                          const std::string& scale) {
  const ScaleRule rule = scale_rule(scale);
  Rows rows = rows_of("fake_quantize_bf16", name, w);
  const grid::Grid& grid = reference ? grid::reference(name) : rows.grid;
  Halves w_hat = make_matrix<Halves>(rows.rows, rows.n);
  const float* in = w.data();
  uint16_t* out = w_hat.mutable_data();
  for_rows("fake_quantize_bf16", rows, [&](int64_t r) {
    return grid.fake_quantize_bf16(in + r * rows.n, rows.n, out + r * rows.n, rule);
  });
  return w_hat;
}

Floats fake_quantize_with(const std::string& name, const Floats& w, const Floats& s, bool reference) {
  Rows rows = rows_of("fake_quantize_with", name, w);
  check_scales("fake_quantize_with", rows, s);
  const grid::Grid& grid = reference ? grid::reference(name) : rows.grid;
  Floats w_hat = make_matrix<Floats>(rows.rows, rows.n);
  const float* in = w.data();
  const float* scales = s.data();
  float* out = w_hat.mutable_data();
  for_rows("fake_quantize_with", rows, [&](int64_t r) {
    return grid.fake_quantize_with(in + r * rows.n, rows.n, scales + r * rows.scales(), out + r * rows.n);
  });
  return w_hat;
}

std::tuple<Floats, Floats> backward(const std::string& name, const Floats& w, const Floats& s,
                                    const Floats& g, const std::string& estimator) {
  const EstimatorKind kind = estimator_kind(estimator);
  const Rows rows = rows_of("backward", name, w);
  check_scales("backward", rows, s);
  check_like("backward", w, g);
  Floats grad_w = make_matrix<Floats>(rows.rows, rows.n);
  Floats grad_s = make_scales(rows);
  const float* weights = w.data();
  const float* scales = s.data();
  const float* in = g.data();
  float* of_w = grad_w.mutable_data();
  float* of_s = grad_s.mutable_data();
  for_rows("backward", rows, [&](int64_t r) {
    return rows.grid.backward(weights + r * rows.n, rows.n, scales + r * rows.scales(), in + r * rows.n, kind,
                              of_w + r * rows.n, of_s + r * rows.scales());
  });
  return {grad_w, grad_s};
}

Floats choose_backward(const std::string& name, const Floats& w, const Floats& grad_s) {
  const Rows rows = rows_of("choose_backward", name, w);
  check_scales("choose_backward", rows, grad_s);
  Floats grad_w = make_matrix<Floats>(rows.rows, rows.n);
  const float* weights = w.data();
  const float* scales = grad_s.data();
  float* out = grad_w.mutable_data();
  std::fill_n(out, grad_w.size(), 0.0F);
  for_rows("choose_backward", rows, [&](int64_t r) {
    return rows.grid.choose_backward(weights + r * rows.n, rows.n, scales + r * rows.scales(),
                                     out + r * rows.n);
  });
  return grad_w;
}

const grid::GgmlType& block_type(const char* function, const std::string& name) {
  const grid::GgmlType* type = grid::ggml_type_of_grid(grid::find(name).info().name);
  if (type == nullptr || type->pack == nullptr) refuse(function, "a grid of ggml blocks", "\"" + name + "\"");
  return *type;
}

Bytes ggml_pack(const std::string& name, const Codes& codes, const Floats& stored) {
  const grid::GgmlType& type = block_type("ggml_pack", name);
  const Rows rows = rows_of("ggml_pack", name, codes);
  check_scales("ggml_pack", rows, stored);
  if (rows.n % type.block != 0) {
    refuse("ggml_pack", "rows of a multiple of " + std::to_string(type.block) + " weights for " + name,
           std::to_string(rows.n));
  }
  const int64_t width = rows.n / type.block * type.bytes;
  Bytes bytes = make_matrix<Bytes>(rows.rows, width);
  const int8_t* in = codes.data();
  const float* scales = stored.data();
  uint8_t* out = bytes.mutable_data();
  for_rows("ggml_pack", rows, [&](int64_t r) {
    type.pack(in + r * rows.n, scales + r * rows.scales(), rows.n, out + r * width);
    return grid::Status::kOk;
  });
  return bytes;
}

std::tuple<Codes, Floats> ggml_unpack(const std::string& name, const Bytes& bytes) {
  const grid::GgmlType& type = block_type("ggml_unpack", name);
  if (bytes.ndim() != 2 || bytes.shape(1) % type.bytes != 0) {
    refuse("ggml_unpack", "bytes [rows, multiple of " + std::to_string(type.bytes) + "]", shape_text(bytes));
  }
  const int64_t width = bytes.shape(1);
  const Rows rows = rows_of("ggml_unpack", name, bytes.shape(0), width / type.bytes * type.block);
  Codes codes = make_matrix<Codes>(rows.rows, rows.n);
  Floats stored = make_scales(rows);
  const uint8_t* in = bytes.data();
  int8_t* out = codes.mutable_data();
  float* scales = stored.mutable_data();
  for_rows("ggml_unpack", rows, [&](int64_t r) {
    type.unpack(in + r * width, rows.n, out + r * rows.n, scales + r * rows.scales());
    return grid::Status::kOk;
  });
  return {codes, stored};
}

}  // namespace

void bind_grid(py::module_& module) {
  using py::arg;
  module.def("grid_names", &grid::names, "Every grid's name, float grids first.");
  module.def(
      "grid_info", &grid_info, arg("name"),
      "What a grid is: name, bits, block (None: a row, or the tensor where whole_tensor), code_min, "
      "code_max, "
      "fields as (name, count per block, dtype), scale_grids and dequant_dtypes (the values that options "
      "behind this name may have), is_float, dtype (float grids).");
  module.def("grid_row_bytes", &row_bytes, arg("name"), arg("n"),
             "Bytes of one row of n weights: packed codes and stored scales.");
  module.def("grid_tensor_bytes", &tensor_bytes, arg("name"), arg("rows"), arg("n"),
             "Bytes of a tensor of that many rows of n weights, a scale that they all share included.");
  module.def("grid_choose", &choose, arg("name"), arg("w").noconvert(), arg("scale") = "reference",
             "The consumer's scale rule, or a search. w float32[rows, n] -> s float32[rows, n / B, P].");
  module.def("grid_store", &store, arg("name"), arg("s").noconvert(), arg("n"),
             "What a file holds of s float32[rows, n / B, P]; NumericError where that is not finite.");
  module.def("grid_encode", &encode, arg("name"), arg("w").noconvert(), arg("s").noconvert(),
             "The consumer's rounding. w float32[rows, n], s unstored scales -> codes int8[rows, n].");
  module.def("grid_decode", &decode, arg("name"), arg("codes").noconvert(), arg("stored").noconvert(),
             "What the consumer computes. codes int8[rows, n], stored -> w_hat float32[rows, n].");
  module.def("grid_in_range", &in_range, arg("name"), arg("w").noconvert(), arg("s").noconvert(),
             "1 where w lies inside the code range of scales s. -> uint8[rows, n].");
  module.def("grid_fake_quantize", &fake_quantize, arg("name"), arg("w").noconvert(),
             arg("reference") = false, arg("scale") = "reference",
             "w float32[rows, n] -> w_hat float32[rows, n]; `reference` forces the scalar path.");
  module.def("grid_fake_quantize_bf16", &fake_quantize_bf16, arg("name"), arg("w").noconvert(),
             arg("reference") = false, arg("scale") = "reference",
             "w float32[rows, n] -> bfloat16 bits uint16[rows, n].");
  module.def("grid_fake_quantize_with", &fake_quantize_with, arg("name"), arg("w").noconvert(),
             arg("s").noconvert(), arg("reference") = false,
             "The same with unstored scales s float32[rows, n / B, P] that the caller holds.");
  module.def("grid_backward", &backward, arg("name"), arg("w").noconvert(), arg("s").noconvert(),
             arg("g").noconvert(), arg("estimator"),
             "(grad_w float32[rows, n], grad_s float32[rows, n / B, P]) of grid_fake_quantize_with, from "
             "g = dL/dw_hat.");
  module.def("grid_choose_backward", &choose_backward, arg("name"), arg("w").noconvert(),
             arg("grad_s").noconvert(),
             "grad_w float32[rows, n] of grid_choose, from grad_s float32[rows, n / B, P]; UnsupportedError "
             "where the rule is a search or rounds.");
  module.def("ggml_pack", &ggml_pack, arg("name"), arg("codes").noconvert(), arg("stored").noconvert(),
             "codes int8[rows, n], stored float32[rows, n / B, P] -> ggml blocks uint8[rows, bytes].");
  module.def("ggml_unpack", &ggml_unpack, arg("name"), arg("bytes").noconvert(),
             "The reverse of `ggml_pack`: (codes, stored).");
}

}  // namespace qat::python
