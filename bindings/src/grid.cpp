#include "qat/grid/grid.hpp"
#include "qat/grid/seq.hpp"

#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "grid_rows.hpp"
#include "qat/grid/ggml.hpp"

namespace qat::python {
namespace {

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
      "grid_holds_seq", [](const std::string& name) { return grid::holds_seq(grid::find(name)); },
      arg("name"), "Whether the scale rule 'seq' is possible: its levels are exact in the grid.");
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
  module.def("ggml_pack", &ggml_pack, arg("name"), arg("codes").noconvert(), arg("stored").noconvert(),
             "codes int8[rows, n], stored float32[rows, n / B, P] -> ggml blocks uint8[rows, bytes].");
  module.def("ggml_unpack", &ggml_unpack, arg("name"), arg("bytes").noconvert(),
             "The reverse of `ggml_pack`: (codes, stored).");
}

}  // namespace qat::python
