#include "metadata.hpp"

#include <nlohmann/json.hpp>

#include "qat/core/error.hpp"

namespace qat::checkpoint {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "libqat.format";
constexpr const char* kFormatVersion = "1";
constexpr const char* kTensors = "libqat.tensors";
constexpr const char* kAliases = "libqat.aliases";
constexpr const char* kConfig = "libqat.config";
constexpr const char* kTokenizer = "libqat.tokenizer";
constexpr const char* kPolicy = "libqat.policy";

std::string text_of(const Json& json) {
  try {
    return json.dump();
  } catch (const Json::exception&) {
    throw ArgumentError("save: expected tensor names in UTF-8, got other bytes");
  }
}

const std::string& required(const Subject& subject, const io::SafetensorsMetadata& metadata,
                            const char* key) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) {
    subject.fail("", std::string("a libqat checkpoint (metadata ") + key + ")", "none");
  }
  return found->second;
}

Json object_of(const Subject& subject, const io::SafetensorsMetadata& metadata, const char* key) {
  const Json json = Json::parse(required(subject, metadata, key), nullptr, false);
  if (!json.is_object()) {
    subject.fail(key, "a JSON object", json.is_discarded() ? "malformed JSON" : json.type_name());
  }
  return json;
}

TensorEntry entry_of(const Subject& subject, const std::string& key, const Json& json) {
  const bool complete =
      json.is_object() && json.size() == 2 && json.contains("weight") && json.contains("shape");
  if (!complete) {
    subject.fail(key, "the keys weight and shape in " + std::string(kTensors), "something else");
  }
  const Json& weight = json["weight"];
  const Json& shape = json["shape"];
  if (!weight.is_string()) subject.fail(key, "weight as a string", weight.type_name());
  if (!shape.is_array()) subject.fail(key, "shape as an array", shape.type_name());
  TensorEntry entry{{weight.get<std::string>()}, {}};
  for (const Json& size : shape) {
    const bool integer = size.is_number_unsigned() && size.get<uint64_t>() <= uint64_t{INT64_MAX};
    if (!integer) subject.fail(key, "a shape of whole numbers", size.type_name());
    entry.shape.push_back(size.get<int64_t>());
  }
  return entry;
}

}  // namespace

io::SafetensorsMetadata write_metadata(const QuantizedCheckpoint& checkpoint) {
  Json tensors = Json::object();
  for (const auto& [key, tensor] : checkpoint.quantized) {
    tensors[key] = {{"weight", tensor.scheme.weight}, {"shape", tensor.shape}};
  }
  return {{kFormat, kFormatVersion},
          {kTensors, text_of(tensors)},
          {kAliases, text_of(Json(checkpoint.aliases))},
          {kConfig, checkpoint.config},
          {kTokenizer, checkpoint.tokenizer},
          {kPolicy, checkpoint.policy}};
}

Metadata read_metadata(const Subject& subject, const io::SafetensorsMetadata& metadata) {
  const std::string& version = required(subject, metadata, kFormat);
  if (version != kFormatVersion) {
    subject.fail(kFormat, std::string("version ") + kFormatVersion, "\"" + version + "\"");
  }
  Metadata result;
  const Json tensors = object_of(subject, metadata, kTensors);
  for (const auto& [key, entry] : tensors.items()) result.tensors[key] = entry_of(subject, key, entry);
  const Json aliases = object_of(subject, metadata, kAliases);
  for (const auto& [key, target] : aliases.items()) {
    if (!target.is_string()) subject.fail(key, "an alias as a string", target.type_name());
    result.aliases[key] = target.get<std::string>();
  }
  result.config = required(subject, metadata, kConfig);
  result.tokenizer = required(subject, metadata, kTokenizer);
  result.policy = required(subject, metadata, kPolicy);
  return result;
}

}  // namespace qat::checkpoint
