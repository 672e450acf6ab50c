#include "export/hf_vocabulary.hpp"

#include <nlohmann/json.hpp>
#include <utility>

#include "export/input_file.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using nlohmann::json;
using std::filesystem::path;

// What the published tokenizers of Llama 3 and Qwen 2 split text with. llama.cpp holds the same expressions
// under the names below; any other expression would cut text elsewhere than the model has learned.
constexpr const char* kLlama3Split =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
constexpr const char* kQwen2Split =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

std::string text_of(const json& value) {
  return value.is_string() ? value.get<std::string>() : std::string();
}

/// One step in a canonical spelling: two steps of one spelling split text alike.
std::string spell_step(const json& step) {
  const std::string type = text_of(field(step, "type"));
  if (type == "ByteLevel") {
    const bool prefix = flag(step, "add_prefix_space", true);
    return std::string(flag(step, "use_regex", true) ? "words" : "bytes") +
           (prefix ? " with a space before" : "");
  }
  if (type == "Digits") return flag(step, "individual_digits", false) ? "digit" : "digits";
  if (type == "Split") {
    // These expressions match every character, so that keeping the matches or cutting around them is the
    // same.
    const std::string behavior = text_of(field(step, "behavior"));
    const bool invert = flag(step, "invert", false);
    const bool cuts = (behavior == "Isolated" && !invert) || (behavior == "Removed" && invert);
    return cuts ? "split " + text_of(field(field(step, "pattern"), "Regex")) : "split otherwise";
  }
  return "unknown " + type;
}

using Steps = std::vector<std::string>;

/// Sequences may be nested, though nobody nests them deeply.
void append_steps(const json& node, Steps& steps, int depth = 4) {
  const json& parts = field(node, "pretokenizers");
  if (text_of(field(node, "type")) != "Sequence" || !parts.is_array() || depth == 0) {
    steps.push_back(spell_step(node));
    return;
  }
  for (const json& part : parts) append_steps(part, steps, depth - 1);
}

/// The name of llama.cpp for a `pre_tokenizer`, or "" when it is none that llama.cpp knows.
std::string pre_tokenizer_name(const Steps& steps) {
  const std::pair<const char*, Steps> known[] = {
      {"gpt-2", {"words"}},
      {"smollm", {"digit", "words"}},
      {"llama-bpe", {std::string("split ") + kLlama3Split, "bytes"}},
      {"qwen2", {std::string("split ") + kQwen2Split, "bytes"}},
  };
  for (const auto& [name, wanted] : known) {
    if (steps == wanted) return name;
  }
  return "";
}

std::string joined(const Steps& steps) {
  std::string text;
  for (const std::string& step : steps) text += (text.empty() ? "\"" : "\", \"") + step;
  return text + "\"";
}

[[noreturn]] void unsupported(const path& file, const std::string& what) {
  throw UnsupportedError("export_checkpoint: " + file.string() +
                         ": expected byte-level BPE of the kind llama-bpe, qwen2, smollm or gpt-2, got " +
                         what +
                         "; take the tokenizer from a GGUF of the same model instead: tokenizer_from "
                         "(--tokenizer-from FILE.gguf)");
}

bool is_blank(const json& value) {
  return value.is_null() || (value.is_string() && value.get_ref<const std::string&>().empty());
}

/// llama.cpp applies no normalizer; for Qwen 2 it leaves out the NFC step as its own converter does.
bool normalizer_is_fine(const json& normalizer, const std::string& pre) {
  if (normalizer.is_null()) return true;
  const std::string type = text_of(field(normalizer, "type"));
  if (type == "Sequence") {
    const json& parts = field(normalizer, "normalizers");
    return parts.is_array() && parts.empty();
  }
  return type == "NFC" && pre == "qwen2";
}

/// The kind of the tokenizer (`tokenizer.ggml.pre`).
std::string recognise(const json& root, const path& file) {
  const json& model = field(root, "model");
  const std::string type = text_of(field(model, "type"));
  const bool bpe = type == "BPE" || (type.empty() && field(model, "merges").is_array());
  if (!bpe) unsupported(file, "a model of type \"" + type + "\"");
  if (flag(model, "byte_fallback", false)) unsupported(file, "BPE with byte_fallback");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!is_blank(field(model, key))) unsupported(file, std::string("BPE with ") + key);
  }
  Steps steps;
  append_steps(field(root, "pre_tokenizer"), steps);
  const std::string pre = pre_tokenizer_name(steps);
  if (pre.empty()) unsupported(file, "a pre_tokenizer of the steps " + joined(steps));
  const json& normalizer = field(root, "normalizer");
  if (!normalizer_is_fine(normalizer, pre)) {
    unsupported(file, "the normalizer " + text_of(field(normalizer, "type")) + " with " + pre);
  }
  // llama.cpp takes a whole word that is a token without merging only for llama-bpe.
  if (flag(model, "ignore_merges", false) && pre != "llama-bpe")
    unsupported(file, "ignore_merges with " + pre);
  return pre;
}

void put_token(Vocabulary& vocabulary, const path& file, const std::string& where, const std::string& token,
               const json& id, TokenType type) {
  if (!id.is_number_unsigned()) fail_json(file, where, "a token id", id);
  const auto value = id.get<uint64_t>();
  if (value >= vocabulary.tokens.size()) {
    throw ArgumentError("export_checkpoint: " + file.string() + ": " + where + ": expected an id below " +
                        std::to_string(vocabulary.tokens.size()) +
                        " (the rows of the model's embedding), got " + std::to_string(value));
  }
  std::string& slot = vocabulary.tokens[value];
  if (!slot.empty() && slot != token) fail_json(file, where, "an id that no other token has", id);
  slot = token;
  vocabulary.types[value] = type;
  vocabulary.ids[token] = static_cast<uint32_t>(value);
}

void read_tokens(Vocabulary& vocabulary, const json& root, const path& file) {
  const json& vocab = field(field(root, "model"), "vocab");
  if (!vocab.is_object()) fail_json(file, "model.vocab", "an object of token: id", vocab);
  for (const auto& [token, id] : vocab.items()) {
    put_token(vocabulary, file, "model.vocab." + token, token, id, kNormalToken);
  }
  const json& added = field(root, "added_tokens");
  if (added.is_null()) return;
  if (!added.is_array()) fail_json(file, "added_tokens", "an array", added);
  for (std::size_t i = 0; i < added.size(); ++i) {
    const std::string where = "added_tokens[" + std::to_string(i) + "]";
    const std::string content = text_of(field(added[i], "content"));
    if (content.empty()) fail_json(file, where + ".content", "a token", added[i]);
    const TokenType type = flag(added[i], "special", false) ? kControlToken : kUserDefinedToken;
    put_token(vocabulary, file, where + ".id", content, field(added[i], "id"), type);
  }
}

/// Both spellings: "a b" (older files) and ["a", "b"].
std::string merge_text(const json& merge, const path& file, std::size_t index) {
  std::string text = text_of(merge);
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    text = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  const std::size_t space = text.find(' ');
  const bool pair = space != std::string::npos && space > 0 && space + 1 < text.size() &&
                    text.find(' ', space + 1) == std::string::npos;
  if (!pair) fail_json(file, "model.merges[" + std::to_string(index) + "]", "a pair of tokens", merge);
  return text;
}

}  // namespace

Vocabulary read_vocabulary(const json& root, const path& file, int64_t vocab_size) {
  Vocabulary vocabulary;
  vocabulary.pre = recognise(root, file);
  vocabulary.tokens.resize(static_cast<std::size_t>(vocab_size));
  vocabulary.types.assign(static_cast<std::size_t>(vocab_size), kUnusedToken);
  read_tokens(vocabulary, root, file);
  for (std::size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (vocabulary.types[id] == kUnusedToken) vocabulary.tokens[id] = "[PAD" + std::to_string(id) + "]";
  }
  const json& merges = field(field(root, "model"), "merges");
  if (!merges.is_array()) fail_json(file, "model.merges", "an array", merges);
  for (std::size_t i = 0; i < merges.size(); ++i) {
    vocabulary.merges.push_back(merge_text(merges[i], file, i));
  }
  return vocabulary;
}

}  // namespace qat
