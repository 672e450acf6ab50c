#include "io/safetensors.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "io/checked.hpp"
#include "io/json_text.hpp"
#include "io/text.hpp"
#include "qat/core/error.hpp"

namespace qat::io {

static_assert(std::endian::native == std::endian::little,
              "the containers are read in place, as little-endian");

using nlohmann::json;

std::optional<std::uint64_t> safetensors_bytes(Dtype dtype, std::span<const std::int64_t> shape) noexcept {
  const auto count = checked_count(shape);
  if (!count) return std::nullopt;
  const auto bits = checked_multiply(*count, static_cast<std::uint64_t>(bit_width(dtype)));
  if (!bits || *bits % 8 != 0) return std::nullopt;
  return *bits / 8;
}

namespace {

constexpr std::uint64_t kLengthBytes = 8;

std::string subject_of(const std::filesystem::path& path) {
  return "read_safetensors: " + path.string();
}

/// The JSON text, after the checks that make it one.
std::string_view header_text(const MappedFile& file) {
  const std::string subject = subject_of(file.path());
  const auto bytes = file.bytes();
  if (bytes.size() < kLengthBytes) {
    throw FileError(subject + ": expected a header length of 8 bytes, got a file of " +
                    std::to_string(bytes.size()));
  }
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kLengthBytes);
  const std::uint64_t most = std::min<std::uint64_t>(kSafetensorsHeaderLimit, bytes.size() - kLengthBytes);
  if (length < 2 || length > most) {
    throw FileError(subject + ": header length: expected 2 to " + std::to_string(most) + " bytes, got " +
                    std::to_string(length));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, length);
  if (text.front() != '{')
    throw FileError(subject + ": header: expected '{', got " + printable(text.substr(0, 1)));
  return text;
}

/// One header entry, checked by itself: where it lies among the others is checked afterwards.
class EntryReader {
 public:
  EntryReader(std::string subject, const std::string& name, const json& entry)
      : subject_(std::move(subject) + ": tensor " + printable(name)), entry_(entry) {
    if (!entry.is_object()) fail("an object", "another JSON value");
  }

  Dtype dtype() const {
    const json& value = member("dtype");
    if (!value.is_string()) fail("a dtype", "another JSON value");
    try {
      return dtype_from_name(value.get_ref<const std::string&>());
    } catch (const ArgumentError& error) {
      throw FileError(subject_ + ": " + error.what());
    }
  }

  std::vector<std::int64_t> shape() const { return integers("shape"); }

  /// Begin and end, relative to the data.
  std::pair<std::uint64_t, std::uint64_t> offsets() const {
    const auto pair = integers("data_offsets");
    if (pair.size() != 2 || pair[0] > pair[1]) fail("data_offsets [begin, end]", "another list");
    return {pair[0], pair[1]};
  }

  [[noreturn]] void fail(const std::string& expected, const std::string& got) const {
    throw FileError(subject_ + ": expected " + expected + ", got " + got);
  }

 private:
  const json& member(const char* key) const {
    const auto found = entry_.find(key);
    if (found == entry_.end()) fail(std::string("a member \"") + key + "\"", "none");
    return *found;
  }

  std::vector<std::int64_t> integers(const char* key) const {
    const json& list = member(key);
    const std::string wanted = std::string(key) + " as a list of integers from 0 to 2^63-1";
    if (!list.is_array()) fail(wanted, "another JSON value");
    std::vector<std::int64_t> result;
    for (const json& item : list) {
      if (!item.is_number_unsigned()) fail(wanted, "another list");
      const auto number = item.get<std::uint64_t>();
      if (number > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        fail(wanted, "a larger one");
      result.push_back(static_cast<std::int64_t>(number));
    }
    return result;
  }

  std::string subject_;
  const json& entry_;
};

SafetensorsTensor read_entry(const std::string& subject, const std::string& name, const json& entry,
                             std::span<const std::byte> data) {
  const EntryReader reader(subject, name, entry);
  SafetensorsTensor tensor{
      .name = name, .dtype = reader.dtype(), .shape = reader.shape(), .offset = 0, .data = {}};
  const auto [begin, end] = reader.offsets();
  if (end > data.size()) {
    reader.fail("data_offsets within the " + std::to_string(data.size()) + " bytes of data",
                "an end at " + std::to_string(end));
  }
  const auto bytes = safetensors_bytes(tensor.dtype, tensor.shape);
  if (!bytes || *bytes != end - begin) {
    reader.fail(
        (bytes ? std::to_string(*bytes) : std::string("a countable number of")) + " bytes by dtype and shape",
        std::to_string(end - begin) + " by data_offsets");
  }
  tensor.offset = begin;  // relative to the data until the order is known to be sound
  tensor.data = data.subspan(begin, end - begin);
  return tensor;
}

/// Tensors follow each other without a gap or overlap and fill the data.
void check_contiguous(const std::string& subject, const std::vector<SafetensorsTensor>& tensors,
                      std::uint64_t total) {
  std::uint64_t expected = 0;
  for (const SafetensorsTensor& tensor : tensors) {
    if (tensor.offset != expected) {
      throw FileError(subject + ": tensor " + printable(tensor.name) + ": expected data to begin at " +
                      std::to_string(expected) + ", got " + std::to_string(tensor.offset));
    }
    expected += tensor.data.size();
  }
  if (expected != total) {
    throw FileError(subject + ": expected " + std::to_string(expected) + " bytes of data, got " +
                    std::to_string(total));
  }
}

SafetensorsMetadata read_metadata(const std::string& subject, const json& object) {
  SafetensorsMetadata metadata;
  bool strings = object.is_object();
  for (auto item = object.begin(); strings && item != object.end(); ++item) {
    strings = item->is_string();
    if (strings) metadata.emplace(item.key(), item->get<std::string>());
  }
  if (!strings)
    throw FileError(subject + ": __metadata__: expected a map of strings, got another JSON value");
  return metadata;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : file_(path) {
  const std::string subject = subject_of(path);
  const std::string_view text = header_text(file_);
  const auto data = file_.bytes().subspan(kLengthBytes + text.size());
  constexpr int kDepth = 3;  // the header, a tensor, its shape
  const json header = parse_json(text, subject + ": header", kDepth);
  for (const auto& [name, entry] : header.items()) {
    if (name == kSafetensorsMetadataKey) {
      metadata_ = read_metadata(subject, entry);
    } else {
      tensors_.push_back(read_entry(subject, name, entry, data));
    }
  }
  // An empty tensor shares its begin with its neighbour and comes first.
  std::stable_sort(tensors_.begin(), tensors_.end(),
                   [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
                     return std::pair(a.offset, a.data.size()) < std::pair(b.offset, b.data.size());
                   });
  check_contiguous(subject, tensors_, data.size());
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    tensors_[i].offset += kLengthBytes + text.size();
    index_.emplace(tensors_[i].name, i);
  }
}

const SafetensorsTensor* SafetensorsFile::find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

const SafetensorsTensor& SafetensorsFile::at(std::string_view name) const {
  if (const SafetensorsTensor* tensor = find(name)) return *tensor;
  throw FileError(subject_of(path()) + ": expected a tensor " + printable(name) + ", got none of that name");
}

}  // namespace qat::io
