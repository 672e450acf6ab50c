#include <nlohmann/json.hpp>
#include <utility>

#include "io/json_text.hpp"
#include "io/text.hpp"
#include "qat/core/error.hpp"
#include "qat/io/safetensors.hpp"

namespace qat::io {

using nlohmann::json;

namespace {

std::string subject_of(const std::filesystem::path& path) {
  return "read_safetensors: " + path.string();
}

/// weight_map of an index file: tensor name -> file name, a plain one beside the index.
std::map<std::string, std::string> read_weight_map(const std::filesystem::path& path) {
  const MappedFile file(path);
  const std::string subject = subject_of(path);
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.size());
  constexpr int kDepth = 8;  // "metadata" is free-form
  const json index = parse_json(text, subject, kDepth);
  const auto found = index.is_object() ? index.find("weight_map") : index.end();
  if (!index.is_object() || found == index.end() || !found->is_object() || found->empty()) {
    throw FileError(subject + ": weight_map: expected a map from tensors to files, got none");
  }
  std::map<std::string, std::string> result;
  for (const auto& [name, shard] : found->items()) {
    const std::string file_name = shard.is_string() ? shard.get<std::string>() : "";
    if (file_name.empty() || file_name == ".." || std::filesystem::path(file_name).filename() != file_name) {
      throw FileError(subject + ": weight_map: " + printable(name) +
                      ": expected the name of a file beside the index, got " +
                      (shard.is_string() ? printable(file_name) : "another JSON value"));
    }
    result.emplace(name, file_name);
  }
  return result;
}

}  // namespace

SafetensorsDirectory::SafetensorsDirectory(const std::filesystem::path& path) : path_(path) {
  const auto single = path / "model.safetensors";
  const auto index = path / "model.safetensors.index.json";
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored) && !std::filesystem::exists(single, ignored)) {
    if (!std::filesystem::exists(index, ignored)) {
      throw FileError(subject_of(path) +
                      ": expected model.safetensors or model.safetensors.index.json in it, got neither");
    }
    open_shards(index);
    return;
  }
  const SafetensorsFile& file =
      files_.emplace_back(std::filesystem::is_directory(path, ignored) ? single : path);
  for (const SafetensorsTensor& tensor : file.tensors()) index_.emplace(tensor.name, &tensor);
}

void SafetensorsDirectory::open_shards(const std::filesystem::path& index_path) {
  const auto weight_map = read_weight_map(index_path);
  std::map<std::string, std::size_t> positions;
  for (const auto& [name, shard] : weight_map) positions.emplace(shard, 0);
  // Tensors are found by address, which a growing vector of files would not change: a file's own list stays
  // put.
  for (auto& [shard, position] : positions) {
    position = files_.size();
    files_.emplace_back(index_path.parent_path() / shard);
  }
  for (const auto& [name, shard] : weight_map) index_.emplace(name, &files_[positions.at(shard)].at(name));
  for (const SafetensorsFile& file : files_) {
    for (const SafetensorsTensor& tensor : file.tensors()) {
      const auto listed = index_.find(tensor.name);
      if (listed == index_.end() || listed->second == &tensor) continue;
      throw FileError(subject_of(index_path) + ": weight_map: expected " + printable(tensor.name) +
                      " in one shard, got it in " + printable(weight_map.at(tensor.name)) + " and " +
                      printable(file.path().filename().string()));
    }
  }
}

std::vector<std::string> SafetensorsDirectory::names() const {
  std::vector<std::string> result;
  for (const auto& [name, tensor] : index_) result.push_back(name);
  return result;
}

const SafetensorsTensor* SafetensorsDirectory::find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : found->second;
}

const SafetensorsTensor& SafetensorsDirectory::at(std::string_view name) const {
  if (const SafetensorsTensor* tensor = find(name)) return *tensor;
  throw FileError(subject_of(path_) + ": expected a tensor " + printable(name) + ", got none of that name");
}

}  // namespace qat::io
