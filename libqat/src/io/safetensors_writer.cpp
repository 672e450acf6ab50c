#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <tuple>

#include "io/safetensors.hpp"
#include "io/stream.hpp"
#include "io/text.hpp"
#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"

namespace qat::io {
namespace {

constexpr const char* kFunction = "write_safetensors";

[[noreturn]] void fail(std::string_view name, const std::string& expected, const std::string& got) {
  throw ArgumentError(std::string(kFunction) + ": tensor " + printable(name) + ": expected " + expected +
                      ", got " + got);
}

std::vector<const SafetensorsEntry*> in_file_order(const std::vector<SafetensorsEntry>& entries) {
  std::vector<const SafetensorsEntry*> order;
  for (const SafetensorsEntry& entry : entries) {
    if (entry.name == kSafetensorsMetadataKey)
      fail(entry.name, "another name", "the one reserved for metadata");
    order.push_back(&entry);
  }
  std::sort(order.begin(), order.end(), [](const SafetensorsEntry* a, const SafetensorsEntry* b) {
    return std::tuple(-bit_width(a->dtype), std::string_view(a->name)) <
           std::tuple(-bit_width(b->dtype), std::string_view(b->name));
  });
  return order;
}

void check_unique(const std::vector<SafetensorsEntry>& entries) {
  std::vector<std::string_view> names;
  for (const SafetensorsEntry& entry : entries) names.emplace_back(entry.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) fail(*twice, "unique names", "this one twice");
}

/// A JSON string; JSON text is UTF-8.
std::string json_string(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    throw ArgumentError(std::string(kFunction) + ": expected names and metadata in UTF-8, got " +
                        printable(text));
  }
}

std::uint64_t bytes_of(const SafetensorsEntry& entry) {
  const auto bytes = safetensors_bytes(entry.dtype, entry.shape);
  if (!bytes) fail(entry.name, "a shape with a countable number of bytes", "another");
  return *bytes;
}

/// The JSON text in the order of the data, padded so that the data starts at a multiple of 8.
std::string header(const std::vector<const SafetensorsEntry*>& order, const SafetensorsMetadata& metadata) {
  std::string text = "{";
  const auto separate = [&text] {
    if (text.back() != '{') text += ',';
  };
  if (!metadata.empty()) {
    text += json_string(std::string(kSafetensorsMetadataKey)) + ":{";
    for (const auto& [name, value] : metadata) {
      separate();
      text += json_string(name) + ":" + json_string(value);
    }
    text += "}";
  }
  std::uint64_t offset = 0;
  for (const SafetensorsEntry* entry : order) {
    separate();
    const std::uint64_t end = offset + bytes_of(*entry);
    text += json_string(entry->name) + R"(:{"dtype":")" + std::string(to_string(entry->dtype)) +
            R"(","shape":)" + nlohmann::json(entry->shape).dump() + R"(,"data_offsets":[)" +
            std::to_string(offset) + "," + std::to_string(end) + "]}";
    offset = end;
  }
  text += "}";
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace

void write_safetensors(const std::filesystem::path& path, const std::vector<SafetensorsEntry>& entries,
                       const SafetensorsMetadata& metadata) {
  check_unique(entries);
  const auto order = in_file_order(entries);
  const std::string text = header(order, metadata);
  if (text.size() > kSafetensorsHeaderLimit) {
    throw UnsupportedError(std::string(kFunction) + ": " + path.string() + ": expected a header of at most " +
                           std::to_string(kSafetensorsHeaderLimit) + " bytes, got " +
                           std::to_string(text.size()));
  }
  AtomicFile file(path);
  const std::uint64_t length = text.size();
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(text);
  for (const SafetensorsEntry* entry : order) {
    stream(file, entry->data, bytes_of(*entry), kFunction, entry->name);
  }
  file.commit();
}

}  // namespace qat::io
