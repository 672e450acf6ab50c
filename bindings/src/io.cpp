#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "module.hpp"
#include "qat/io/gguf.hpp"
#include "qat/io/safetensors.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

/// Arrays longer than this are shown by their beginning: a vocabulary has hundreds of thousands of entries.
constexpr std::size_t kShownElements = 8;

/// File text is UTF-8 by promise only.
py::str text(const std::string& bytes) {
  const auto size = static_cast<py::ssize_t>(bytes.size());
  return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(bytes.data(), size, "replace"));
}

template <class T>
py::object scalar(const T& value) {
  if constexpr (std::is_same_v<T, std::string>) {
    return text(value);
  } else {
    return py::cast(value);
  }
}

template <class T>
py::object array(const std::vector<T>& elements, bool full) {
  const std::size_t shown = full ? elements.size() : std::min(elements.size(), kShownElements);
  py::list list;
  for (std::size_t i = 0; i < shown; ++i) list.append(scalar<T>(elements[i]));
  if (shown == elements.size()) return list;
  py::dict summary;
  summary["length"] = elements.size();
  summary["first"] = list;
  return summary;
}

py::object to_python(const io::GgufValue& value, bool full) {
  return std::visit(
      [full]<class T>(const T& typed) -> py::object {
        if constexpr (std::is_arithmetic_v<T> || std::is_same_v<T, std::string>) {
          return scalar(typed);
        } else {
          return array(typed, full);
        }
      },
      value);
}

py::dict read_gguf_header(const std::filesystem::path& path, bool full) {
  const io::GgufFile file = [&path] {
    const py::gil_scoped_release release;
    return io::GgufFile(path);
  }();
  py::dict metadata;
  py::dict types;
  for (const auto& [key, value] : file.metadata()) {
    metadata[text(key)] = to_python(value, full);
    types[text(key)] = io::describe_type(value);
  }
  py::list tensors;
  for (const io::GgufTensor& tensor : file.tensors()) {
    py::dict entry;
    entry["name"] = text(tensor.name);
    entry["type"] = std::string(io::ggml_type_size(tensor.type)->name);
    entry["shape"] = tensor.shape();
    entry["offset"] = tensor.offset;
    entry["bytes"] = tensor.data.size();
    tensors.append(entry);
  }
  py::dict header;
  header["version"] = file.version();
  header["alignment"] = file.alignment();
  header["metadata"] = metadata;
  header["types"] = types;
  header["tensors"] = tensors;
  return header;
}

py::dict read_safetensors_header(const std::filesystem::path& path) {
  const io::SafetensorsFile file = [&path] {
    const py::gil_scoped_release release;
    return io::SafetensorsFile(path);
  }();
  py::list tensors;
  for (const io::SafetensorsTensor& tensor : file.tensors()) {
    py::dict entry;
    entry["name"] = tensor.name;
    entry["dtype"] = std::string(io::to_string(tensor.dtype));
    entry["shape"] = tensor.shape;
    entry["offset"] = tensor.offset;
    entry["bytes"] = tensor.data.size();
    tensors.append(entry);
  }
  py::dict header;
  header["metadata"] = file.metadata();
  header["tensors"] = tensors;
  return header;
}

}  // namespace

void bind_io(py::module_& module) {
  module.def(
      "read_gguf_header", &read_gguf_header, py::arg("path"), py::kw_only(), py::arg("full") = false,
      R"(What a GGUF file declares: {"version", "alignment", "metadata": {key: value}, "types": {key: type},
"tensors": [{"name", "type", "shape", "offset", "bytes"}]}, in file order.

Shapes are in torch's order (outermost first), offsets in bytes from the start of the file. An array of more than 8
elements is given as {"length", "first"} unless `full`. Raises FileError when the file is missing or malformed.)");
  module.def(
      "read_safetensors_header", &read_safetensors_header, py::arg("path"),
      R"(What a safetensors file declares: {"metadata": {key: text}, "tensors": [{"name", "dtype", "shape",
"offset", "bytes"}]}, in the order of the data.

Offsets are in bytes from the start of the file. Raises FileError when the file is missing or malformed.)");
}

}  // namespace qat::python
