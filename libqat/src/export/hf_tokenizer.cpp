// Special tokens and beginning-of-text rule of a Hugging Face tokenizer. They are spread over tokenizer.json
// and the files beside it; the first file that speaks wins, in the order that llama.cpp's own converter uses:
// tokenizer_config.json, config.json, generation_config.json, the model's configuration.

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "export/hf_chat.hpp"
#include "export/hf_vocabulary.hpp"
#include "export/input_file.hpp"
#include "export/tokenizer_metadata.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using nlohmann::json;
using std::filesystem::path;

/// SmolLM2's vocabulary. Its tokenizer_config.json speaks of a beginning token, but the models were trained
/// without one; llama.cpp's converter has the same exception.
constexpr int64_t kSmolLmVocabulary = 49152;

struct TokenizerFiles {
  json tokenizer;
  json tokenizer_config;
  json generation_config;
  std::vector<json> configs;  ///< with `*_token_id` fields, the most trusted first
};

/// The part that describes the decoder, in models with more than text.
json text_config(json config) {
  const json& text = field(config, "text_config");
  return text.is_object() ? json(text) : config;
}

TokenizerFiles read_files(const path& file, const std::string& config) {
  const path folder = file.parent_path();
  TokenizerFiles files;
  files.tokenizer = read_json(file);
  files.tokenizer_config = read_json_if_there(folder / "tokenizer_config.json");
  files.generation_config = read_json_if_there(folder / "generation_config.json");
  files.configs = {read_json_if_there(folder / "config.json"), files.generation_config,
                   text_config(json::parse(config, nullptr, false))};
  return files;
}

/// "<s>", or {"content": "<s>", ...}.
std::string token_text(const json& value) {
  const json& content = value.is_object() ? field(value, "content") : value;
  return content.is_string() ? content.get<std::string>() : std::string();
}

std::optional<uint32_t> id_in_config(const json& config, const std::string& key, int64_t vocab_size) {
  json value = field(config, key);
  if (value.is_array() && !value.empty()) value = value[0];
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) return {};
  return value.get<uint32_t>();
}

/// `role`: "bos", "eos", "unk" or "pad".
std::optional<uint32_t> special_id(const TokenizerFiles& files, const Vocabulary& vocabulary,
                                   const std::string& role) {
  const auto named = vocabulary.ids.find(token_text(field(files.tokenizer_config, role + "_token")));
  if (named != vocabulary.ids.end()) return named->second;
  for (const json& config : files.configs) {
    const auto id = id_in_config(config, role + "_token_id", static_cast<int64_t>(vocabulary.tokens.size()));
    if (id) return id;
  }
  return {};
}

const json& elements(const json& value) {
  static const json kNone = json::array();
  return value.is_array() ? value : kNone;
}

bool has_type(const json& object, const char* type) {
  return token_text(field(object, "type")) == type;
}

/// What a Hugging Face tokenizer puts around one text, as a list of pieces.
const json& pieces_around_text(const json& processor) {
  constexpr const char* kTemplate = "TemplateProcessing";
  if (has_type(processor, kTemplate)) return elements(field(processor, "single"));
  for (const json& part : elements(field(processor, "processors"))) {
    if (has_type(part, kTemplate)) return elements(field(part, "single"));
  }
  return elements(json());
}

/// Whether the tokenizer puts the token `id` before (`first`) or after a text.
bool adds(const TokenizerFiles& files, const Vocabulary& vocabulary, const char* key,
          std::optional<uint32_t> id, bool first) {
  if (!id) return false;
  const json& configured = field(files.tokenizer_config, key);
  if (configured.is_boolean()) return configured.get<bool>();
  const json& pieces = pieces_around_text(field(files.tokenizer, "post_processor"));
  if (pieces.empty()) return false;
  const json& piece = field(first ? pieces.front() : pieces.back(), "SpecialToken");
  const auto found = vocabulary.ids.find(token_text(field(piece, "id")));
  return found != vocabulary.ids.end() && found->second == *id;
}

/// Generation ends at any of these besides `eos`. GGUF has two more places; llama.cpp stops at each of them,
/// and at tokens that it knows by name ("<|im_end|>", "<|eot_id|>", ...).
std::vector<uint32_t> further_ends(const TokenizerFiles& files, const path& file, std::optional<uint32_t> eos,
                                   int64_t vocab_size) {
  constexpr std::size_t kPlaces = 2;
  std::vector<uint32_t> ends;
  const json& config = files.generation_config.is_null() ? files.configs.back() : files.generation_config;
  for (const uint32_t id : end_ids(config, vocab_size)) {
    if (id != eos && std::find(ends.begin(), ends.end(), id) == ends.end()) ends.push_back(id);
  }
  if (ends.size() > kPlaces) {
    throw UnsupportedError(
        "export_checkpoint: " + file.parent_path().string() +
        ": eos_token_id: expected at most 3 tokens that end a text, which is what GGUF can "
        "say, got " +
        std::to_string(ends.size() + 1));
  }
  return ends;
}

}  // namespace

io::GgufMetadata hf_tokenizer_metadata(const path& file, const std::string& config,
                                       const arch::Family& family, int64_t vocab_size) {
  const TokenizerFiles files = read_files(file, config);
  Vocabulary vocabulary = read_vocabulary(files.tokenizer, file, family, vocab_size);
  const auto bos = special_id(files, vocabulary, "bos");
  const auto eos = special_id(files, vocabulary, "eos");
  const std::vector<uint32_t> ends = further_ends(files, file, eos, vocab_size);
  const bool add_bos = vocab_size != kSmolLmVocabulary && adds(files, vocabulary, "add_bos_token", bos, true);
  const bool add_eos = adds(files, vocabulary, "add_eos_token", eos, false);

  io::GgufMetadata metadata;
  metadata.set("tokenizer.ggml.model", vocabulary.model);
  if (!vocabulary.pre.empty()) metadata.set("tokenizer.ggml.pre", vocabulary.pre);
  const std::pair<const char*, std::optional<uint32_t>> ids[] = {
      {"tokenizer.ggml.bos_token_id", bos},
      {"tokenizer.ggml.eos_token_id", eos},
      {"tokenizer.ggml.unknown_token_id", special_id(files, vocabulary, "unk")},
      {"tokenizer.ggml.padding_token_id", special_id(files, vocabulary, "pad")}};
  metadata.set("tokenizer.ggml.tokens", std::move(vocabulary.tokens));
  if (!vocabulary.scores.empty()) metadata.set("tokenizer.ggml.scores", std::move(vocabulary.scores));
  metadata.set("tokenizer.ggml.token_type", std::move(vocabulary.types));
  if (!vocabulary.merges.empty()) metadata.set("tokenizer.ggml.merges", std::move(vocabulary.merges));
  for (const auto& [key, id] : ids) {
    if (id) metadata.set(key, *id);
  }
  constexpr const char* kEndKeys[] = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
  for (std::size_t i = 0; i < ends.size(); ++i) metadata.set(kEndKeys[i], ends[i]);
  metadata.set("tokenizer.ggml.add_bos_token", add_bos);
  metadata.set("tokenizer.ggml.add_eos_token", add_eos);
  metadata.set("tokenizer.ggml.add_space_prefix", false);
  add_chat_templates(file.parent_path(), files.tokenizer_config, metadata);
  add_sampling_defaults(files.generation_config, file.parent_path(), metadata);
  return metadata;
}

}  // namespace qat
