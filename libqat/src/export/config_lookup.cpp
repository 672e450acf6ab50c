#include "export/config_lookup.hpp"

#include <charconv>
#include <nlohmann/json.hpp>

#include "export/input_file.hpp"

namespace qat {
namespace {

using nlohmann::json;

/// A member of an object, or of an array by its number; null when there is none.
const json& member(const json& node, std::string_view name) {
  if (!node.is_array()) return field(node, name);
  static const json none;
  std::size_t index = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), index);
  const bool number = error == std::errc() && end == name.data() + name.size();
  return number && index < node.size() ? node[index] : none;
}

arch::ConfigValue value_of(const json& value) {
  if (value.is_null()) return {};
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number()) return value.get<double>();
  if (value.is_string()) return value.get<std::string>();
  return true;
}

}  // namespace

const json& find_path(const json& root, std::string_view path) {
  const json* node = &root;
  for (std::size_t dot = path.find('.'); dot != std::string_view::npos; dot = path.find('.')) {
    node = &member(*node, path.substr(0, dot));
    path.remove_prefix(dot + 1);
  }
  return member(*node, path);
}

arch::ConfigLookup lookup_in(const json& root) {
  return [&root](std::string_view path) { return value_of(find_path(root, path)); };
}

}  // namespace qat
