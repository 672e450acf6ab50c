#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "io/safetensors.hpp"
#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"
#include "qat/io/safetensors.hpp"

namespace qat::io {
namespace {

constexpr const char* kIndex = "model.safetensors.index.json";

using Shard = std::vector<SafetensorsEntry>;

/// 0 for what the writer will refuse with a better message.
std::uint64_t bytes_of(const SafetensorsEntry& entry) {
  return safetensors_bytes(entry.dtype, entry.shape).value_or(0);
}

std::vector<Shard> fill_shards(const std::vector<SafetensorsEntry>& entries, std::uint64_t limit) {
  std::vector<Shard> shards(1);
  std::uint64_t filled = 0;
  for (const SafetensorsEntry& entry : entries) {
    const std::uint64_t bytes = bytes_of(entry);
    if (!shards.back().empty() && (filled > limit || bytes > limit - filled)) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(entry);
    filled += bytes;
  }
  return shards;
}

std::string shard_name(std::size_t index, std::size_t count) {
  if (count == 1) return "model.safetensors";
  std::array<char, 64> name{};
  std::snprintf(name.data(), name.size(), "model-%05zu-of-%05zu.safetensors", index + 1, count);
  return name.data();
}

}  // namespace

std::vector<std::string> write_safetensors_directory(const std::filesystem::path& directory,
                                                     const std::vector<SafetensorsEntry>& entries,
                                                     std::int64_t max_shard_bytes,
                                                     const SafetensorsMetadata& metadata) {
  if (max_shard_bytes <= 0) {
    throw ArgumentError("write_safetensors_directory: max_shard_bytes: expected a number > 0, got " +
                        std::to_string(max_shard_bytes));
  }
  const std::vector<Shard> shards = fill_shards(entries, static_cast<std::uint64_t>(max_shard_bytes));
  nlohmann::json weight_map = nlohmann::json::object();
  std::uint64_t total = 0;
  std::vector<std::string> names;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    names.push_back(shard_name(i, shards.size()));
    for (const SafetensorsEntry& entry : shards[i]) {
      if (!weight_map.emplace(entry.name, names.back()).second) {
        throw ArgumentError("write_safetensors_directory: " + entry.name +
                            ": expected unique names, got this one twice");
      }
      total += bytes_of(entry);
    }
  }
  for (std::size_t i = 0; i < shards.size(); ++i)
    write_safetensors(directory / names[i], shards[i], metadata);
  if (shards.size() > 1) {
    const nlohmann::json index{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
    write_file_atomically(directory / kIndex, index.dump(2) + "\n");
    names.emplace_back(kIndex);
  }
  return names;
}

}  // namespace qat::io
