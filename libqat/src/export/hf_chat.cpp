#include "export/hf_chat.hpp"

#include <algorithm>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "export/input_file.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using nlohmann::json;
using std::filesystem::path;

constexpr const char* kDefault = "default";

/// Letters, digits and "_", as keys of the file. (gguf-py, `add_chat_template`)
std::string key_name(const std::string& name) {
  std::string key = name;
  std::replace_if(
      key.begin(), key.end(),
      [](char c) { return !((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9')); },
      '_');
  return key;
}

using Templates = std::map<std::string, std::string>;

void put(Templates& templates, const path& file, const std::string& name, const json& text) {
  if (!text.is_string()) fail_json(file, "chat_template " + name, "a text", text);
  if (!templates.emplace(key_name(name), text.get<std::string>()).second) {
    throw FileError("export_checkpoint: " + file.string() +
                    ": chat_template: expected names that differ in letters "
                    "and digits, got " +
                    shown(name) + " again");
  }
}

/// transformers 5: a file for each.
void read_files(const path& folder, Templates& templates) {
  const path single = folder / "chat_template.jinja";
  if (std::filesystem::is_regular_file(single)) put(templates, single, kDefault, read_text(single));
  const path more = folder / "additional_chat_templates";
  if (!std::filesystem::is_directory(more)) return;
  for (const auto& entry : std::filesystem::directory_iterator(more)) {
    if (entry.path().extension() != ".jinja") continue;
    put(templates, entry.path(), entry.path().stem().string(), read_text(entry.path()));
  }
}

/// Older: one text, or a list of {"name", "template"}.
void read_value(const json& value, const path& file, Templates& templates) {
  if (value.is_null()) return;
  if (!value.is_array()) return put(templates, file, kDefault, value);
  for (const json& named : value) {
    const json& name = field(named, "name");
    if (!name.is_string()) fail_json(file, "chat_template", "a list of names and templates", named);
    put(templates, file, name.get<std::string>(), field(named, "template"));
  }
}

Templates read_templates(const path& folder, const json& tokenizer_config) {
  Templates templates;
  read_files(folder, templates);
  if (templates.empty()) {
    const path file = folder / "chat_template.json";
    read_value(field(read_json_if_there(file), "chat_template"), file, templates);
  }
  if (templates.empty()) {
    read_value(field(tokenizer_config, "chat_template"), folder / "tokenizer_config.json", templates);
  }
  return templates;
}

}  // namespace

void add_chat_templates(const path& folder, const json& tokenizer_config, io::GgufMetadata& metadata) {
  const std::string key = "tokenizer.chat_template";
  std::vector<std::string> names;
  const Templates templates = read_templates(folder, tokenizer_config);
  for (const auto& [name, text] : templates) {
    if (name == kDefault) continue;
    metadata.set(key + "." + name, text);
    names.push_back(name);
  }
  if (!names.empty()) metadata.set(key + "s", names);
  const auto single = templates.find(kDefault);
  if (single != templates.end()) metadata.set(key, single->second);
}

void add_sampling_defaults(const json& generation_config, const path& folder, io::GgufMetadata& metadata) {
  const path file = folder / "generation_config.json";
  if (!flag(generation_config, "do_sample", true)) return;
  const std::pair<const char*, const char*> numbers[] = {
      {"temperature", "temp"}, {"top_p", "top_p"}, {"min_p", "min_p"}};
  for (const auto& [name, key] : numbers) {
    const json& value = field(generation_config, name);
    if (value.is_null()) continue;
    if (!value.is_number()) fail_json(file, name, "a number", value);
    metadata.set(std::string("general.sampling.") + key, value.get<float>());
  }
  const json& count = field(generation_config, "top_k");
  if (count.is_null()) return;
  constexpr uint64_t kMost = std::numeric_limits<int32_t>::max();
  if (!count.is_number_unsigned() || count.get<uint64_t>() > kMost)
    fail_json(file, "top_k", "a count", count);
  metadata.set("general.sampling.top_k", count.get<int32_t>());
}

std::vector<uint32_t> end_ids(const json& config, int64_t vocab_size) {
  const json& value = field(config, "eos_token_id");
  std::vector<uint32_t> ids;
  const auto add = [&](const json& id) {
    if (id.is_number_unsigned() && id.get<uint64_t>() < static_cast<uint64_t>(vocab_size))
      ids.push_back(id.get<uint32_t>());
  };
  if (value.is_array()) {
    for (const json& id : value) add(id);
  } else {
    add(value);
  }
  return ids;
}

}  // namespace qat
