#include "export/hf_vocabulary.hpp"

#include <algorithm>
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

constexpr const char* kSpace = "\u2581";

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
  throw UnsupportedError(
      "export_checkpoint: " + file.string() +
      ": expected byte-level BPE of the kind llama-bpe, qwen2, smollm or gpt-2 (or, for Gemma, "
      "BPE over characters), got " +
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

void require_bpe(const json& model, const path& file) {
  const std::string type = text_of(field(model, "type"));
  const bool bpe = type == "BPE" || (type.empty() && field(model, "merges").is_array());
  if (!bpe) unsupported(file, "a model of type \"" + type + "\"");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!is_blank(field(model, key))) unsupported(file, std::string("BPE with ") + key);
  }
}

/// The steps of a BPE over characters: spaces become "▁", and a text is one word. (A split at spaces after
/// that cuts nothing.)
void require_character_steps(const json& root, const path& file) {
  const json& normalizer = field(root, "normalizer");
  const bool replaces = text_of(field(normalizer, "type")) == "Replace" &&
                        text_of(field(field(normalizer, "pattern"), "String")) == " " &&
                        text_of(field(normalizer, "content")) == kSpace;
  if (!replaces) unsupported(file, "BPE with byte_fallback and another normalizer than \" \" to \"▁\"");
  const json& words = field(root, "pre_tokenizer");
  const bool whole = words.is_null() || (text_of(field(words, "type")) == "Split" &&
                                         text_of(field(field(words, "pattern"), "String")) == " ");
  if (!whole) unsupported(file, "BPE with byte_fallback and a pre_tokenizer");
  if (flag(field(root, "model"), "ignore_merges", false))
    unsupported(file, "ignore_merges with byte_fallback");
}

/// The kind of a byte-level tokenizer (`tokenizer.ggml.pre`).
std::string recognise(const json& root, const path& file) {
  const json& model = field(root, "model");
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

/// "<0x0A>"
bool is_byte(const std::string& token) {
  return token.size() == 6 && token.starts_with("<0x") && token.ends_with('>') &&
         token.find_first_not_of("0123456789ABCDEF", 3) == 5;
}

/// Where the characters of a UTF-8 text begin, without the first.
std::vector<std::size_t> borders(const std::string& text) {
  std::vector<std::size_t> found;
  for (std::size_t i = 1; i < text.size(); ++i) {
    if ((static_cast<unsigned char>(text[i]) & 0xC0U) != 0x80U) found.push_back(i);
  }
  return found;
}

/// llama.cpp's SentencePiece joins the neighbours that make the token of the highest score, whatever the
/// neighbours; BPE joins the pair of the lowest rank. They agree when every way to make a token is a merge
/// and the ranks of a token's merges lie together.
void score_tokens(Vocabulary& vocabulary, const path& file) {
  const auto refuse = [&](const std::string& token) {
    unsupported(file, "merges that no scores of tokens stand for (\"" + token + "\")");
  };
  constexpr float kNever = -1e9F;
  vocabulary.scores.assign(vocabulary.tokens.size(), kNever);
  std::unordered_map<std::string, std::size_t> ways;
  std::string last;
  float rank = 0.0F;
  for (const std::string& merge : vocabulary.merges) {
    std::string token = merge;
    token.erase(token.find(' '), 1);
    const auto id = vocabulary.ids.find(token);
    if (id == vocabulary.ids.end()) refuse(token);
    if (token != last && ways.contains(token)) refuse(token);
    if (token != last) rank -= 1.0F;
    vocabulary.scores[id->second] = rank;
    ++ways[token];
    last = std::move(token);
  }
  for (const auto& [token, id] : vocabulary.ids) {
    const int32_t type = vocabulary.types[id];
    const bool added = type == kControlToken || type == kUserDefinedToken;
    const auto made = ways.find(token);
    if (added && made == ways.end()) continue;  // cut out of a text before anything is joined
    std::size_t possible = 0;
    for (const std::size_t border : borders(token)) {
      possible +=
          vocabulary.ids.contains(token.substr(0, border)) && vocabulary.ids.contains(token.substr(border));
    }
    if (possible != (made == ways.end() ? 0 : made->second)) refuse(token);
  }
  vocabulary.merges.clear();
}

/// llama.cpp cuts a text for "gemma4" before and after line ends; no token may reach across.
void require_whole_lines(const Vocabulary& vocabulary, const path& file) {
  for (const std::string& merge : vocabulary.merges) {
    const bool has_end = merge.find('\n') != std::string::npos;
    if (has_end && merge.find_first_not_of("\n ") != std::string::npos) {
      unsupported(file, "a token with a line end and something else");
    }
  }
}

void read_character_bpe(Vocabulary& vocabulary, const json& root, const path& file,
                        const arch::Family& family) {
  require_character_steps(root, file);
  vocabulary.model = family.character_bpe;
  for (std::size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (is_byte(vocabulary.tokens[id])) vocabulary.types[id] = kByteToken;
  }
  const auto retype = [&](const std::string& token, TokenType type) {
    const auto found = vocabulary.ids.find(token);
    if (found != vocabulary.ids.end()) vocabulary.types[found->second] = type;
  };
  retype(text_of(field(field(root, "model"), "unk_token")), kUnknownToken);
  for (const std::string_view token : family.visible_tokens) retype(std::string(token), kUserDefinedToken);
  if (vocabulary.model == "llama") {
    vocabulary.pre = "default";
    score_tokens(vocabulary, file);
    return;
  }
  require_whole_lines(vocabulary, file);
  constexpr float kNoScore = -1000.0F;  // gguf-py vocab.py, LlamaHfVocab
  vocabulary.scores.assign(vocabulary.tokens.size(), kNoScore);
}

}  // namespace

Vocabulary read_vocabulary(const json& root, const path& file, const arch::Family& family,
                           int64_t vocab_size) {
  const json& model = field(root, "model");
  require_bpe(model, file);
  const bool characters = flag(model, "byte_fallback", false);
  if (characters && family.character_bpe.empty()) unsupported(file, "BPE with byte_fallback");
  Vocabulary vocabulary;
  if (!characters) vocabulary.pre = recognise(root, file);
  vocabulary.tokens.resize(static_cast<std::size_t>(vocab_size));
  vocabulary.types.assign(static_cast<std::size_t>(vocab_size), kUnusedToken);
  read_tokens(vocabulary, root, file);
  for (std::size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (vocabulary.types[id] == kUnusedToken) vocabulary.tokens[id] = "[PAD" + std::to_string(id) + "]";
  }
  const json& merges = field(model, "merges");
  if (!merges.is_array()) fail_json(file, "model.merges", "an array", merges);
  for (std::size_t i = 0; i < merges.size(); ++i) {
    vocabulary.merges.push_back(merge_text(merges[i], file, i));
  }
  if (characters) read_character_bpe(vocabulary, root, file, family);
  return vocabulary;
}

int64_t hf_token_count(const path& file) {
  const json root = read_json(file);
  const json& vocab = field(field(root, "model"), "vocab");
  if (!vocab.is_object()) fail_json(file, "model.vocab", "an object of token: id", vocab);
  int64_t count = 0;
  const auto add = [&](const json& id) {
    constexpr int64_t kMost = int64_t{1} << 31;
    if (id.is_number_unsigned()) count = std::max(count, std::min(id.get<int64_t>(), kMost) + 1);
  };
  for (const auto& [token, id] : vocab.items()) add(id);
  const json& added = field(root, "added_tokens");
  if (added.is_array()) {
    for (const json& token : added) add(field(token, "id"));
  }
  return count;
}

}  // namespace qat
