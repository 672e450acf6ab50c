#include "export/input_file.hpp"

#include <fstream>
#include <nlohmann/json.hpp>

#include "qat/core/error.hpp"
#include "qat/io/mapped_file.hpp"

namespace qat {

using nlohmann::json;

std::string read_text(const std::filesystem::path& path) {
  const io::MappedFile file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.size()};
}

json read_json(const std::filesystem::path& path) {
  try {
    return json::parse(read_text(path));
  } catch (const json::exception& error) {
    throw FileError("export_checkpoint: " + path.string() + ": expected JSON, got " + error.what());
  }
}

json read_json_if_there(const std::filesystem::path& path) {
  return std::filesystem::is_regular_file(path) ? read_json(path) : json();
}

bool is_gguf(const std::filesystem::path& path) {
  char magic[4] = {};
  std::ifstream stream(path, std::ios::binary);
  return stream.read(magic, sizeof magic) && std::string_view(magic, sizeof magic) == "GGUF";
}

std::string quantization_method(const std::filesystem::path& folder) {
  std::ifstream stream(folder / "config.json", std::ios::binary);
  if (!stream) return "";
  const json config = json::parse(stream, nullptr, false);
  const json& method = field(field(config, "quantization_config"), "quant_method");
  return method.is_string() ? method.get<std::string>() : "";
}

const json& field(const json& object, std::string_view key) {
  static const json kNull;
  if (!object.is_object()) return kNull;
  const auto found = object.find(key);
  return found == object.end() ? kNull : *found;
}

bool flag(const json& object, std::string_view key, bool fallback) {
  const json& value = field(object, key);
  return value.is_boolean() ? value.get<bool>() : fallback;
}

std::string shown(const json& value) {
  constexpr std::size_t kShown = 120;
  if (value.is_null()) return "none";
  if (value.is_structured()) return std::string("an ") + value.type_name();  // may be deep: not to be dumped
  // ASCII only, so that cutting it splits no character.
  const std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() > kShown ? text.substr(0, kShown) + "..." : text;
}

void fail_json(const std::filesystem::path& path, const std::string& where, const char* expected,
               const json& value) {
  throw FileError("export_checkpoint: " + path.string() + ": " + where + ": expected " + expected + ", got " +
                  shown(value));
}

}  // namespace qat
