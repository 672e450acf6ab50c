// Reading a checkpoint. The container's reader has bounded every tensor by the file; this one compares them
// with what the metadata promises.

#include <ATen/ops/empty.h>

#include <cstring>
#include <set>

#include "check.hpp"
#include "dtype.hpp"
#include "metadata.hpp"
#include "qat/grid/pack.hpp"
#include "qat/grid/stored.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {
namespace {

using checkpoint::Sizes;
using checkpoint::Subject;

/// An open file, and which of its tensors have been claimed.
struct Reader {
  const Subject& subject;
  const io::SafetensorsFile& file;
  std::set<std::string> claimed;

  const io::SafetensorsTensor& claim(const std::string& name, io::Dtype dtype, at::IntArrayRef shape) {
    const std::string expected = std::string(io::to_string(dtype)) + checkpoint::shape_text(shape);
    const io::SafetensorsTensor* tensor = file.find(name);
    if (tensor == nullptr) subject.fail(name, expected, "none");
    if (tensor->dtype != dtype || at::IntArrayRef(tensor->shape) != shape) {
      subject.fail(name, expected,
                   std::string(io::to_string(tensor->dtype)) + checkpoint::shape_text(tensor->shape));
    }
    claimed.insert(name);
    return *tensor;
  }
};

at::Tensor read_codes(Reader& reader, const std::string& key, const Sizes& sizes) {
  const grid::Info& info = sizes.grid.info();
  const int64_t bytes = grid::packed_bytes(sizes.width, info.bits);
  const auto& packed = reader.claim(key + ".codes", io::Dtype::kU8, {sizes.rows, bytes});
  at::Tensor codes = at::empty({sizes.rows, sizes.width}, at::kChar);
  const auto* source = reinterpret_cast<const uint8_t*>(packed.data.data());
  int8_t* row = codes.mutable_data_ptr<int8_t>();
  const int used = static_cast<int>(sizes.width * info.bits % 8);
  for (int64_t r = 0; r < sizes.rows; ++r, source += bytes, row += sizes.width) {
    grid::unpack_codes(source, sizes.width, info.bits, info.code_min, row);
    if (used != 0 && source[bytes - 1] >> used != 0) {
      reader.subject.fail(packed.name, "unused bits of 0", "others in row " + std::to_string(r));
    }
  }
  return codes;
}

at::Tensor read_scales(Reader& reader, const std::string& key, const Sizes& sizes) {
  const int64_t blocks = sizes.grid.blocks(sizes.width);
  const int64_t params = sizes.grid.params();
  at::Tensor scales = at::empty({sizes.scale_rows(), blocks, params}, at::kFloat);
  float* first = scales.mutable_data_ptr<float>();
  for (const grid::Field& field : sizes.grid.info().fields) {
    std::vector<int64_t> shape{sizes.scale_rows(), blocks};
    if (field.count > 1) shape.push_back(field.count);
    const auto& stored =
        reader.claim(key + "." + std::string(field.name), checkpoint::file_dtype(field.dtype), shape);
    const auto* source = reinterpret_cast<const uint8_t*>(stored.data.data());
    for (int64_t block = 0; block < sizes.scale_rows() * blocks; ++block) {
      for (int i = 0; i < field.count; ++i, source += grid::dtype_bytes(field.dtype)) {
        first[block * params + i] = grid::get_stored(source, field.dtype);
      }
    }
    first += field.count;
  }
  return scales;
}

/// R: as the codes say for a stack of matrices.
int64_t rows_of(const io::SafetensorsFile& file, const std::string& key, const std::vector<int64_t>& shape) {
  const io::SafetensorsTensor* codes = file.find(key + ".codes");
  const bool stacked = shape.size() > 2 && codes != nullptr && codes->shape.size() == 2;
  return stacked ? codes->shape[0] : shape.empty() ? 0 : shape[0];
}

at::Tensor read_float(const Subject& subject, const io::SafetensorsTensor& stored) {
  const auto dtype = checkpoint::tensor_dtype(stored.dtype);
  if (!dtype) {
    subject.fail(stored.name, "a tensor of floats, integers or bools",
                 std::string(io::to_string(stored.dtype)));
  }
  at::Tensor tensor = at::empty(stored.shape, *dtype);
  if (!stored.data.empty()) std::memcpy(tensor.mutable_data_ptr(), stored.data.data(), stored.data.size());
  return tensor;
}

}  // namespace

QuantizedCheckpoint load(const std::string& path) {
  const Subject subject{"load: " + path + ": ", true};
  const io::SafetensorsFile file(path);
  checkpoint::Metadata metadata = checkpoint::read_metadata(subject, file.metadata());
  Reader reader{subject, file, {}};
  QuantizedCheckpoint checkpoint;
  for (auto& [key, entry] : metadata.tensors) {
    const Sizes sizes =
        checkpoint::sizes_of(subject, key, entry.scheme, entry.shape, rows_of(file, key, entry.shape));
    const at::Tensor codes = read_codes(reader, key, sizes);
    checkpoint.quantized[key] = {entry.scheme, entry.shape, codes, read_scales(reader, key, sizes)};
  }
  for (const io::SafetensorsTensor& tensor : file.tensors()) {
    if (!reader.claimed.contains(tensor.name)) checkpoint.floats[tensor.name] = read_float(subject, tensor);
  }
  checkpoint.aliases = std::move(metadata.aliases);
  checkpoint.config = std::move(metadata.config);
  checkpoint.tokenizer = std::move(metadata.tokenizer);
  checkpoint.policy = std::move(metadata.policy);
  checkpoint::check(subject, checkpoint);
  return checkpoint;
}

}  // namespace qat
