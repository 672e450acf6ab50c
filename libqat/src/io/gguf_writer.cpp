#include <bit>
#include <cstring>
#include <set>

#include "io/checked.hpp"
#include "io/gguf_format.hpp"
#include "io/stream.hpp"
#include "io/text.hpp"
#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"

namespace qat::io {
namespace {

constexpr const char* kFunction = "write_gguf";

[[noreturn]] void fail(const std::string& subject, const std::string& expected, const std::string& got) {
  throw ArgumentError(std::string(kFunction) + ": " + subject + ": expected " + expected + ", got " + got);
}

/// Little-endian bytes of everything before the data.
class Header {
 public:
  template <class T>
  void put(const T& value) {
    if constexpr (std::is_same_v<T, bool>) {
      text_ += static_cast<char>(value);
    } else if constexpr (std::is_same_v<T, std::string>) {
      put<std::uint64_t>(value.size());
      text_ += value;
    } else {
      static_assert(std::is_arithmetic_v<T>);
      text_.append(reinterpret_cast<const char*>(&value), sizeof(T));
    }
  }

  template <class T>
  void put(const std::vector<T>& elements) {
    put<std::uint64_t>(elements.size());
    for (const auto& element : elements) put<T>(element);
  }

  void put(const GgufValue& value) {
    put(static_cast<std::uint32_t>(type_of(value)));
    if (type_of(value) == GgufType::kArray) put(static_cast<std::uint32_t>(element_type_of(value)));
    std::visit([this](const auto& typed) { put(typed); }, value);
  }

  void put_magic() { text_ += kGgufMagic; }

  const std::string& text() const noexcept { return text_; }

 private:
  std::string text_;
};

std::uint32_t alignment_of(const GgufMetadata& metadata) {
  const GgufValue* value = metadata.find(kGgufAlignmentKey);
  if (value == nullptr) return kGgufDefaultAlignment;
  const auto* alignment = std::get_if<std::uint32_t>(value);
  if (alignment == nullptr || !std::has_single_bit(*alignment)) {
    fail("key \"general.alignment\"", "a u32 that is a power of two",
         alignment == nullptr ? describe_type(*value) : std::to_string(*alignment));
  }
  return *alignment;
}

std::uint64_t bytes_of(const GgufEntry& entry) {
  const std::string subject = "tensor " + printable(entry.name);
  const GgmlTypeSize* type = ggml_type_size(entry.type);
  if (type == nullptr) fail(subject, "a tensor type of ggml", std::to_string(entry.type));
  const auto bytes = gguf_bytes(*type, entry.dims);
  if (!bytes) {
    fail(subject,
         "dims of a possible size, the first a multiple of " + std::to_string(type->block_elements) + " as " +
             std::string(type->name) + " asks for",
         entry.dims.empty() ? "none" : "a first dim of " + std::to_string(entry.dims.front()));
  }
  return *bytes;
}

void check_names(const std::vector<GgufEntry>& entries) {
  std::set<std::string_view> names;
  for (const GgufEntry& entry : entries) {
    const std::string subject = "tensor " + printable(entry.name);
    if (entry.name.empty() || entry.name.size() > kGgufLongestName) {
      fail(subject, "a name of 1 to 63 bytes", std::to_string(entry.name.size()));
    }
    if (entry.dims.size() > kGgufMaxDims) fail(subject, "at most 4 dims", std::to_string(entry.dims.size()));
    if (!names.insert(entry.name).second) fail(subject, "unique names", "this one twice");
  }
}

std::string header(const GgufMetadata& metadata, const std::vector<GgufEntry>& entries,
                   std::uint64_t alignment) {
  Header result;
  result.put_magic();
  result.put(kGgufVersion);
  result.put<std::uint64_t>(entries.size());
  result.put<std::uint64_t>(metadata.size());
  for (const auto& [key, value] : metadata) {
    result.put(key);
    result.put(value);
  }
  std::uint64_t offset = 0;
  for (const GgufEntry& entry : entries) {
    result.put(entry.name);
    result.put(static_cast<std::uint32_t>(entry.dims.size()));
    for (const std::int64_t dim : entry.dims) result.put(dim);
    result.put(entry.type);
    result.put(offset);
    const auto end = checked_align(bytes_of(entry), alignment);
    if (!end || __builtin_add_overflow(offset, *end, &offset)) {
      fail("tensor " + printable(entry.name), "a file of fewer than 2^64 bytes", "more");
    }
  }
  return result.text();
}

void pad(AtomicFile& file, std::uint64_t alignment) {
  file.write_zeros((alignment - file.size() % alignment) % alignment);
}

}  // namespace

void write_gguf(const std::filesystem::path& path, const GgufMetadata& metadata,
                const std::vector<GgufEntry>& entries) {
  check_names(entries);
  const std::uint64_t alignment = alignment_of(metadata);
  const std::string text = header(metadata, entries, alignment);
  AtomicFile file(path);
  file.write(text);
  pad(file, alignment);
  for (const GgufEntry& entry : entries) {
    stream(file, entry.data, bytes_of(entry), kFunction, entry.name);
    pad(file, alignment);
  }
  file.commit();
}

}  // namespace qat::io
