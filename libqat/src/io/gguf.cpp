#include "qat/io/gguf.hpp"

#include <bit>
#include <limits>
#include <optional>
#include <type_traits>

#include "io/byte_cursor.hpp"
#include "io/checked.hpp"
#include "io/gguf_format.hpp"
#include "io/text.hpp"
#include "qat/core/error.hpp"

// 1. "GGUF" | u32 version | u64 tensors | u64 pairs
// 2. pairs:   string key | u32 type | value (array: u32 element type | u64 count | elements)
// 3. tensors: string name | u32 n_dims | u64 dims[n_dims] | u32 type | u64 offset
// 4. zeros up to a multiple of the alignment, then the data; tensor i at its offset, padded to the alignment
// A string is a u64 length and its bytes.

namespace qat::io {

static_assert(std::endian::native == std::endian::little,
              "the containers are read in place, as little-endian");

namespace {

constexpr std::uint64_t kLeastPairBytes = 8 + 1 + 4 + 1;
constexpr std::uint64_t kLeastTensorBytes = 8 + 1 + 4 + 4 + 8;

std::string subject_of(const std::filesystem::path& path) {
  return "read_gguf: " + path.string();
}

bool read_bool(ByteCursor& cursor, const std::string& what) {
  const auto byte = cursor.number<std::uint8_t>(what);
  if (byte > 1) cursor.fail(what, "a bool of 0 or 1", std::to_string(byte));
  return byte == 1;
}

template <class T>
T read_scalar(ByteCursor& cursor, const std::string& what) {
  if constexpr (std::is_same_v<T, bool>) {
    return read_bool(cursor, what);
  } else if constexpr (std::is_same_v<T, std::string>) {
    return std::string(cursor.string(what));
  } else {
    return cursor.number<T>(what);
  }
}

template <class T>
constexpr std::uint64_t least_bytes() {
  return std::is_same_v<T, std::string> ? 8 : sizeof(T);  // an empty string is its length
}

GgufValue read_value(ByteCursor& cursor, const std::string& what) {
  const auto id = cursor.number<std::uint32_t>(what);
  GgufValue value;
  if (static_cast<GgufType>(id) != GgufType::kArray) {
    const bool known = with_scalar_type(static_cast<GgufType>(id), [&]<class T>(std::type_identity<T>) {
      value = GgufValue(std::in_place_type<T>, read_scalar<T>(cursor, what));
    });
    if (!known) cursor.fail(what, "a value type from 0 to 12", std::to_string(id));
    return value;
  }
  const auto element_id = cursor.number<std::uint32_t>(what);
  const bool known = with_scalar_type(static_cast<GgufType>(element_id), [&]<class T>(std::type_identity<T>) {
    std::vector<T> elements;
    const std::uint64_t count = cursor.count(what, least_bytes<T>());
    elements.reserve(count);
    for (std::uint64_t i = 0; i < count; ++i) elements.push_back(read_scalar<T>(cursor, what));
    value = std::move(elements);
  });
  if (!known)
    cursor.fail(what, "array elements of a scalar or string type", "type " + std::to_string(element_id));
  return value;
}

GgufMetadata read_metadata(ByteCursor& cursor, std::uint64_t count) {
  GgufMetadata metadata;
  for (std::uint64_t i = 0; i < count; ++i) {
    std::string key(cursor.string("key " + std::to_string(i)));
    const std::string what = "key " + printable(key);
    if (key.empty()) cursor.fail(what, "a name", "an empty one");
    if (metadata.find(key) != nullptr) cursor.fail(what, "unique keys", "this one twice");
    GgufValue value = read_value(cursor, what);
    metadata.set(std::move(key), std::move(value));
  }
  return metadata;
}

std::uint32_t read_alignment(const ByteCursor& cursor, const GgufMetadata& metadata) {
  const GgufValue* value = metadata.find(kGgufAlignmentKey);
  if (value == nullptr) return kGgufDefaultAlignment;
  const auto* alignment = std::get_if<std::uint32_t>(value);
  if (alignment == nullptr || !std::has_single_bit(*alignment)) {
    cursor.fail("key \"general.alignment\"", "a u32 that is a power of two",
                alignment == nullptr ? describe_type(*value) : std::to_string(*alignment));
  }
  return *alignment;
}

/// The entry of one tensor; its data is found once all entries are read, so `offset` counts from the data's
/// start.
GgufTensor read_info(ByteCursor& cursor, std::uint64_t position) {
  GgufTensor tensor;
  tensor.name = cursor.string("tensor " + std::to_string(position));
  const std::string what = "tensor " + printable(tensor.name);
  if (tensor.name.empty() || tensor.name.size() > kGgufLongestName) {
    cursor.fail(what, "a name of 1 to 63 bytes", std::to_string(tensor.name.size()));
  }
  const auto n_dims = cursor.number<std::uint32_t>(what);
  if (n_dims > kGgufMaxDims) cursor.fail(what, "at most 4 dims", std::to_string(n_dims));
  for (std::uint32_t i = 0; i < n_dims; ++i) tensor.dims.push_back(cursor.number<std::int64_t>(what));
  tensor.type = cursor.number<std::uint32_t>(what);
  tensor.offset = cursor.number<std::uint64_t>(what);
  return tensor;
}

std::uint64_t bytes_of(const ByteCursor& cursor, const GgufTensor& tensor) {
  const std::string what = "tensor " + printable(tensor.name);
  const GgmlTypeSize* type = ggml_type_size(tensor.type);
  if (type == nullptr)
    cursor.fail(what, "a tensor type of ggml that libqat knows", std::to_string(tensor.type));
  const auto bytes = gguf_bytes(*type, tensor.dims);
  if (!bytes) {
    std::string dims;
    for (const std::int64_t dim : tensor.dims) dims += (dims.empty() ? "" : ", ") + std::to_string(dim);
    cursor.fail(what,
                "dims of a possible size, the first a multiple of " + std::to_string(type->block_elements) +
                    " as " + std::string(type->name) + " asks for",
                "[" + dims + "]");
  }
  return *bytes;
}

/// Checks that the tensors lie one after the other, and cuts their data out of the file.
void place(const ByteCursor& cursor, std::vector<GgufTensor>& tensors, std::uint64_t alignment,
           std::span<const std::byte> file) {
  const std::uint64_t start =
      checked_align(cursor.offset(), alignment).value();  // far below 2^64: both are file sizes
  std::uint64_t expected = 0;
  for (GgufTensor& tensor : tensors) {
    const std::string what = "tensor " + printable(tensor.name);
    const std::uint64_t bytes = bytes_of(cursor, tensor);
    if (tensor.offset != expected) {
      cursor.fail(what, "offset " + std::to_string(expected), std::to_string(tensor.offset));
    }
    // The last tensor may lack its padding, so the start can be beyond the end only for an empty one.
    const std::uint64_t room = start + expected <= file.size() ? file.size() - start - expected : 0;
    if (bytes > room) {
      cursor.fail(what,
                  std::to_string(bytes) + " bytes of data from byte " + std::to_string(start + expected),
                  "a file of " + std::to_string(file.size()) + " bytes");
    }
    tensor.offset = start + expected;
    if (bytes > 0) tensor.data = file.subspan(tensor.offset, bytes);
    expected = checked_align(expected + bytes, alignment).value();  // at most file size + alignment
  }
}

}  // namespace

GgufFile::GgufFile(const std::filesystem::path& path) : file_(path) {
  ByteCursor cursor(file_.bytes(), subject_of(path));
  const auto magic = cursor.take(kGgufMagic.size(), "magic");
  const std::string_view text(reinterpret_cast<const char*>(magic.data()), magic.size());
  if (text != kGgufMagic) cursor.fail("magic", "\"GGUF\"", printable(text));
  version_ = cursor.number<std::uint32_t>("version");
  if (version_ < kGgufOldestVersion || version_ > kGgufVersion) {
    cursor.fail("version", "2 or 3, little-endian", std::to_string(version_));
  }
  const auto tensor_count = cursor.count("number of tensors", kLeastTensorBytes);
  const auto pair_count = cursor.count("number of keys", kLeastPairBytes);
  metadata_ = read_metadata(cursor, pair_count);
  alignment_ = read_alignment(cursor, metadata_);
  for (std::uint64_t i = 0; i < tensor_count; ++i) {
    tensors_.push_back(read_info(cursor, i));
    if (!index_.emplace(tensors_.back().name, i).second) {
      cursor.fail("tensor " + printable(tensors_.back().name), "unique names", "this one twice");
    }
  }
  place(cursor, tensors_, alignment_, file_.bytes());
}

const GgufValue& GgufFile::require(std::string_view key) const {
  if (const GgufValue* value = metadata_.find(key)) return *value;
  throw FileError(subject_of(path()) + ": expected a key " + printable(key) + ", got none of that name");
}

void GgufFile::fail_type(std::string_view key, std::string_view expected, const GgufValue& got) const {
  throw FileError(subject_of(path()) + ": key " + printable(key) + ": expected " + std::string(expected) +
                  ", got " + describe_type(got));
}

std::int64_t GgufFile::get_integer(std::string_view key) const {
  const GgufValue& value = require(key);
  const auto integer = std::visit(
      []<class T>(const T& typed) -> std::optional<std::int64_t> {
        if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
          if (std::in_range<std::int64_t>(typed)) return static_cast<std::int64_t>(typed);
        }
        return std::nullopt;
      },
      value);
  if (!integer) fail_type(key, "an integer within 64 bits", value);
  return *integer;
}

double GgufFile::get_number(std::string_view key) const {
  const GgufValue& value = require(key);
  const auto number = std::visit(
      []<class T>(const T& typed) -> std::optional<double> {
        if constexpr (std::is_arithmetic_v<T> && !std::is_same_v<T, bool>) return static_cast<double>(typed);
        return std::nullopt;
      },
      value);
  if (!number) fail_type(key, "a number", value);
  return *number;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

const GgufTensor& GgufFile::tensor(std::string_view name) const {
  if (const GgufTensor* found = find_tensor(name)) return *found;
  throw FileError(subject_of(path()) + ": expected a tensor " + printable(name) + ", got none of that name");
}

}  // namespace qat::io
