// Writing a checkpoint. Nothing is requantized: codes are packed and stored scales narrowed to their own
// type.

#include <span>

#include "check.hpp"
#include "dtype.hpp"
#include "metadata.hpp"
#include "qat/grid/pack.hpp"
#include "qat/grid/stored.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {
namespace {

using checkpoint::Sizes;

std::vector<int64_t> sizes_vector(at::IntArrayRef sizes) {
  return {sizes.begin(), sizes.end()};
}

io::SafetensorsEntry codes_entry(const std::string& key, const Sizes& sizes, const at::Tensor& tensor) {
  const int bits = sizes.grid.info().bits;
  const int code_min = sizes.grid.info().code_min;
  const int64_t bytes = grid::packed_bytes(sizes.width, bits);
  const auto produce = [=, rows = sizes.rows, width = sizes.width,
                        codes = tensor.cpu().contiguous()](const io::ByteSink& sink) {
    std::vector<uint8_t> row(static_cast<size_t>(bytes));
    const int8_t* source = codes.const_data_ptr<int8_t>();
    for (int64_t r = 0; r < rows; ++r, source += width) {
      grid::pack_codes(source, width, bits, code_min, row.data());
      sink(std::as_bytes(std::span(row)));
    }
  };
  return {key + ".codes", io::Dtype::kU8, {sizes.rows, bytes}, produce};
}

/// The scale parameters [first, first + field.count) of each block.
io::SafetensorsEntry field_entry(const std::string& key, const Sizes& sizes, const grid::Field& field,
                                 int64_t first, const at::Tensor& tensor) {
  const int64_t blocks = sizes.grid.blocks(sizes.width);
  const int64_t params = sizes.grid.params();
  const auto produce = [=, rows = sizes.scale_rows(),
                        scales = tensor.cpu().contiguous()](const io::ByteSink& sink) {
    const int64_t bytes = grid::dtype_bytes(field.dtype);
    std::vector<uint8_t> row(static_cast<size_t>(blocks * field.count * bytes));
    const float* block = scales.const_data_ptr<float>() + first;
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* to = row.data();
      for (int64_t b = 0; b < blocks; ++b, block += params) {
        for (int i = 0; i < field.count; ++i, to += bytes) grid::put_stored(block[i], field.dtype, to);
      }
      sink(std::as_bytes(std::span(row)));
    }
  };
  std::vector<int64_t> shape{sizes.scale_rows(), blocks};
  if (field.count > 1) shape.push_back(field.count);
  return {key + "." + std::string(field.name), checkpoint::file_dtype(field.dtype), shape, produce};
}

io::SafetensorsEntry float_entry(const std::string& key, const at::Tensor& tensor) {
  const auto produce = [values = tensor.cpu().contiguous()](const io::ByteSink& sink) {
    sink({static_cast<const std::byte*>(values.const_data_ptr()), values.nbytes()});
  };
  return {key, *checkpoint::file_dtype(tensor.scalar_type()), sizes_vector(tensor.sizes()), produce};
}

}  // namespace

void save(const QuantizedCheckpoint& checkpoint, const std::string& path) {
  const checkpoint::Subject subject{"save: ", false};
  checkpoint::check(subject, checkpoint);
  std::vector<io::SafetensorsEntry> entries;
  for (const auto& [key, tensor] : checkpoint.quantized) {
    const Sizes sizes = checkpoint::sizes_of(subject, key, tensor);
    entries.push_back(codes_entry(key, sizes, tensor.codes));
    int64_t first = 0;
    for (const grid::Field& field : sizes.grid.info().fields) {
      entries.push_back(field_entry(key, sizes, field, first, tensor.scales));
      first += field.count;
    }
  }
  for (const auto& [key, tensor] : checkpoint.floats) entries.push_back(float_entry(key, tensor));
  io::write_safetensors(path, entries, checkpoint::write_metadata(checkpoint));
}

}  // namespace qat
