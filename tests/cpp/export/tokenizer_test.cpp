#include "qat/core/error.hpp"
#include "qat/export/export.hpp"
#include "qat/io/gguf.hpp"
#include "tiny_checkpoint.hpp"

#include "catch.hpp"

namespace {

using Catch::Contains;
using Strings = std::vector<std::string>;

constexpr const char* kGpt2 = R"({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true})";
constexpr const char* kBytes =
    R"({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false})";

std::string sequence(const std::string& first, const std::string& second) {
  return R"({"type": "Sequence", "pretokenizers": [)" + first + ", " + second + "]}";
}

/// The expression of Llama 3 and Qwen 2 as it stands in their tokenizer.json; they differ in the numbers.
std::string split(const std::string& numbers, const std::string& behavior = "Isolated", bool invert = false) {
  return R"({"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|)" +
         numbers + R"(| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": ")" +
         behavior + R"(", "invert": )" + (invert ? "true}" : "false}");
}

/// Four tokens: a special one (added only), two bytes, and their merge.
struct Tokenizer {
  std::string pre = kGpt2;
  std::string normalizer = "null";
  std::string type = "BPE";
  std::string options;
  std::string vocab = R"({"a": 1, "b": 2, "ab": 3})";
  std::string merges = R"(["a b"])";
  std::string added = R"([{"id": 0, "content": "<s>", "special": true}])";
  std::string post = "null";

  std::string json() const {
    return R"({"version": "1.0", "added_tokens": )" + added + R"(, "normalizer": )" + normalizer +
           R"(, "pre_tokenizer": )" + pre + R"(, "post_processor": )" + post + R"(, "model": {"type": ")" +
           type + "\"" + options + R"(, "vocab": )" + vocab + R"(, "merges": )" + merges + "}}";
  }
};

/// A folder with a tokenizer, and the file that an export with it gives.
class Exported {
 public:
  explicit Exported(const Tokenizer& tokenizer,
                    const std::vector<std::pair<std::string, std::string>>& beside = {},
                    const std::string& more_config = "", int64_t vocab_size = tiny::kVocabulary)
      : folder_("tokenizer_test"), checkpoint_(tiny::checkpoint()) {
    tiny::write(folder_.file("tokenizer.json"), tokenizer.json());
    for (const auto& [name, text] : beside) tiny::write(folder_.file(name), text);
    auto& embedding = checkpoint_.quantized["model.embed_tokens.weight"];
    embedding = tiny::quantized(vocab_size, tiny::kHidden, "q8_0");
    auto& config = checkpoint_.config;
    config.replace(config.find(": 4,"), 4, ": " + std::to_string(vocab_size) + "," + more_config);
    checkpoint_.tokenizer = folder_.file("");
  }

  qat::io::GgufFile file() const {
    qat::export_checkpoint(checkpoint_, folder_.file("a.gguf"));
    return qat::io::GgufFile(folder_.file("a.gguf"));
  }
  std::string refusal() const {
    try {
      file();
    } catch (const qat::UnsupportedError& error) {
      return std::string("unsupported ") + error.what();
    } catch (const qat::Error& error) {
      return error.what();
    }
    return "no error";
  }

 private:
  tiny::Folder folder_;
  qat::QuantizedCheckpoint checkpoint_;
};

std::string pre_of(const std::string& pre_tokenizer) {
  Tokenizer tokenizer;
  tokenizer.pre = pre_tokenizer;
  return Exported(tokenizer).file().get<std::string>("tokenizer.ggml.pre");
}

std::string refusal_of(void (*change)(Tokenizer&)) {
  Tokenizer tokenizer;
  change(tokenizer);
  return Exported(tokenizer).refusal();
}

/// The value, or -1 when the key is absent.
int64_t id_in(const qat::io::GgufFile& file, const std::string& role) {
  const std::string key = "tokenizer.ggml." + role + "_token_id";
  return file.metadata().find(key) == nullptr ? -1 : static_cast<int64_t>(file.get<uint32_t>(key));
}

}  // namespace

TEST_CASE("the kind is told by how text is split") {
  const std::string digits = R"({"type": "Digits", "individual_digits": true})";
  REQUIRE(pre_of(kGpt2) == "gpt-2");
  REQUIRE(pre_of(sequence(digits, kGpt2)) == "smollm");
  REQUIRE(pre_of(sequence(split("\\\\p{N}{1,3}"), kBytes)) == "llama-bpe");
  REQUIRE(pre_of(sequence(split("\\\\p{N}"), kBytes)) == "qwen2");
  REQUIRE(pre_of(sequence(split("\\\\p{N}", "Removed", true), kBytes)) == "qwen2");
  REQUIRE(pre_of(R"({"type": "Sequence", "pretokenizers": [)" + sequence(digits, kGpt2) + "]}") == "smollm");
}

TEST_CASE("tokenizers of other kinds are refused with the way out") {
  const auto refuse = [](const std::string& message, const std::string& what) {
    REQUIRE_THAT(message,
                 Catch::StartsWith("unsupported ") && Contains(what) && Contains("--tokenizer-from"));
  };
  refuse(refusal_of([](Tokenizer& t) { t.pre = R"({"type": "ByteLevel"})"; }),
         "pre_tokenizer");  // a space before
  refuse(refusal_of([](Tokenizer& t) { t.pre = "null"; }), "pre_tokenizer");
  refuse(refusal_of([](Tokenizer& t) { t.pre = R"({"type": "Whitespace"})"; }), "Whitespace");
  refuse(refusal_of([](Tokenizer& t) { t.pre = sequence(split("\\\\d"), kBytes); }), "pre_tokenizer");
  refuse(refusal_of([](Tokenizer& t) { t.pre = sequence(split("\\\\p{N}", "Removed"), kBytes); }),
         "split otherwise");
  refuse(refusal_of([](Tokenizer& t) { t.pre = sequence(split("\\\\p{N}"), kGpt2); }), "pre_tokenizer");
  refuse(refusal_of([](Tokenizer& t) { t.pre = sequence(R"({"type": "Digits"})", kGpt2); }), "digits");
  refuse(refusal_of([](Tokenizer& t) { t.normalizer = R"({"type": "NFC"})"; }), "NFC");
  refuse(refusal_of([](Tokenizer& t) { t.type = "WordPiece"; }), "WordPiece");
  refuse(refusal_of([](Tokenizer& t) { t.options = R"(, "byte_fallback": true)"; }), "byte_fallback");
  refuse(refusal_of([](Tokenizer& t) { t.options = R"(, "end_of_word_suffix": "</w>")"; }),
         "end_of_word_suffix");
  refuse(refusal_of([](Tokenizer& t) { t.options = R"(, "ignore_merges": true)"; }), "ignore_merges");
}

TEST_CASE("what a kind's own tokenizers have is accepted") {
  Tokenizer qwen;
  qwen.pre = sequence(split("\\\\p{N}"), kBytes);
  qwen.normalizer = R"({"type": "NFC"})";
  REQUIRE(Exported(qwen).refusal() == "no error");
  Tokenizer llama;
  llama.pre = sequence(split("\\\\p{N}{1,3}"), kBytes);
  llama.options = R"(, "ignore_merges": true, "continuing_subword_prefix": "", "unk_token": null)";
  REQUIRE(Exported(llama).refusal() == "no error");
}

TEST_CASE("tokens stand in the order of their ids, rows without a token are filled") {
  Tokenizer tokenizer;
  tokenizer.vocab = R"({"ab": 4, "b": 2, "a": 1})";
  tokenizer.merges = R"([["a", "b"], "ab a"])";
  tokenizer.added =
      R"([{"id": 0, "content": "<s>", "special": true}, {"id": 5, "content": "<t>", "special": false},
                        {"id": 2, "content": "b", "special": true}])";
  const auto file = Exported(tokenizer, {}, "", 7).file();
  REQUIRE(file.get<Strings>("tokenizer.ggml.tokens") ==
          Strings{"<s>", "a", "b", "[PAD3]", "ab", "<t>", "[PAD6]"});
  REQUIRE(file.get<std::vector<int32_t>>("tokenizer.ggml.token_type") ==
          std::vector<int32_t>{3, 1, 3, 5, 1, 4, 5});
  REQUIRE(file.get<Strings>("tokenizer.ggml.merges") == Strings{"a b", "ab a"});
  REQUIRE(file.get<std::string>("tokenizer.ggml.model") == "gpt2");
}

TEST_CASE("a malformed tokenizer is refused with file and place") {
  const auto refuse = [](const std::string& message, const std::string& place) {
    REQUIRE_THAT(message, Contains("tokenizer.json") && Contains(place));
  };
  refuse(refusal_of([](Tokenizer& t) { t.vocab = R"({"a": 4})"; }), "model.vocab.a: expected an id below 4");
  refuse(refusal_of([](Tokenizer& t) { t.vocab = R"({"a": -1})"; }),
         "model.vocab.a: expected a token id, got -1");
  refuse(refusal_of([](Tokenizer& t) { t.vocab = R"({"a": 1, "b": 1})"; }), "model.vocab.b");
  refuse(refusal_of([](Tokenizer& t) { t.vocab = R"(["a"])"; }), "model.vocab");
  refuse(refusal_of([](Tokenizer& t) { t.merges = R"(["ab"])"; }), "model.merges[0]");
  refuse(refusal_of([](Tokenizer& t) { t.merges = R"(["a b", "a  b"])"; }), "model.merges[1]");
  refuse(refusal_of([](Tokenizer& t) { t.merges = R"([["a"]])"; }), "model.merges[0]");
  refuse(refusal_of([](Tokenizer& t) { t.added = R"([{"id": 0}])"; }), "added_tokens[0].content");
  refuse(refusal_of([](Tokenizer& t) { t.added = R"([{"content": "<s>"}])"; }), "added_tokens[0].id");
  refuse(refusal_of([](Tokenizer& t) { t.added = "{"; }), "expected JSON");
}

TEST_CASE("special ids come from the first file that names them") {
  const auto beside =
      Exported(Tokenizer(),
               {{"tokenizer_config.json", R"({"bos_token": "<s>", "eos_token": {"content": "b"},
                                                              "unk_token": "absent", "pad_token": null})"},
                {"generation_config.json", R"({"eos_token_id": [1], "pad_token_id": 3})"}},
               R"("bos_token_id": 3, "unk_token_id": 1,)")
          .file();
  REQUIRE(id_in(beside, "bos") == 0);
  REQUIRE(id_in(beside, "eos") == 2);
  REQUIRE(id_in(beside, "unknown") == 1);
  REQUIRE(id_in(beside, "padding") == 3);
  const auto bare = Exported(Tokenizer(), {{"generation_config.json", R"({"eos_token_id": [1, 2]})"}},
                             R"("bos_token_id": 99, "pad_token_id": null,)")
                        .file();
  REQUIRE(id_in(bare, "bos") == -1);  // beyond the vocabulary
  REQUIRE(id_in(bare, "eos") == 1);
  REQUIRE(id_in(bare, "eot") == 2);
  REQUIRE(id_in(bare, "padding") == -1);
}

TEST_CASE("several ends of generation take the places that GGUF has, each once") {
  const std::pair<std::string, std::string> named{"tokenizer_config.json", R"({"eos_token": "b"})"};
  const auto ends = [&](const std::string& list) {
    const std::string json = R"({"eos_token_id": )" + list + "}";
    const auto file = Exported(Tokenizer(), {named, {"generation_config.json", json}}).file();
    return std::vector<int64_t>{id_in(file, "eos"), id_in(file, "eot"), id_in(file, "eom")};
  };
  REQUIRE(ends("2") == std::vector<int64_t>{2, -1, -1});
  REQUIRE(ends("[2, 3, 2, 3]") == std::vector<int64_t>{2, 3, -1});
  REQUIRE(ends("[3, 1]") == std::vector<int64_t>{2, 3, 1});
  REQUIRE(ends("[3, 99, \"1\"]") == std::vector<int64_t>{2, 3, -1});
  REQUIRE_THROWS_WITH(ends("[3, 1, 0]"), Contains("eos_token_id: expected at most 3") && Contains("got 4"));
}

TEST_CASE("sampling defaults are taken over unless decoding is to be greedy") {
  const auto sampled = [](const std::string& json) {
    return Exported(Tokenizer(), {{"generation_config.json", json}}).file();
  };
  const auto file =
      sampled(R"({"temperature": 0.6, "top_p": 1, "top_k": 20, "min_p": 0.05, "do_sample": true})");
  REQUIRE(file.get<float>("general.sampling.temp") == 0.6F);
  REQUIRE(file.get<float>("general.sampling.top_p") == 1.0F);
  REQUIRE(file.get<float>("general.sampling.min_p") == 0.05F);
  REQUIRE(file.get<int32_t>("general.sampling.top_k") == 20);
  const auto greedy = sampled(R"({"temperature": 0.6, "top_k": 20, "do_sample": false})");
  REQUIRE(greedy.metadata().find("general.sampling.temp") == nullptr);
  REQUIRE(greedy.metadata().find("general.sampling.top_k") == nullptr);
  REQUIRE_THROWS_WITH(sampled(R"({"temperature": "hot"})"),
                      Contains("temperature: expected a number, got \"hot\""));
  for (const char* count : {"-1", "2.5", "4294967296"}) {
    REQUIRE_THROWS_WITH(sampled(std::string(R"({"top_k": )") + count + "}"),
                        Contains("top_k: expected a count"));
  }
}

TEST_CASE("a beginning token is added when the tokenizer adds it") {
  const std::string around = R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}},
                                 {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "b"}}]})";
  const std::string ids = R"("bos_token_id": 0, "eos_token_id": 2,)";
  const auto added = [&](const std::string& post, const std::string& config, int64_t vocab_size = 4) {
    Tokenizer tokenizer;
    tokenizer.post = post;
    const auto file = Exported(tokenizer, {{"tokenizer_config.json", config}}, ids, vocab_size).file();
    return std::pair(file.get<bool>("tokenizer.ggml.add_bos_token"),
                     file.get<bool>("tokenizer.ggml.add_eos_token"));
  };
  REQUIRE(added("null", "{}") == std::pair(false, false));
  REQUIRE(added(R"({"type": "ByteLevel"})", "{}") == std::pair(false, false));
  REQUIRE(added(around, "{}") == std::pair(true, true));
  REQUIRE(added(R"({"type": "Sequence", "processors": [{"type": "ByteLevel"}, )" + around + "]}", "{}") ==
          std::pair(true, true));
  REQUIRE(added(around, R"({"bos_token": "a", "eos_token": "a"})") ==
          std::pair(false, false));  // others than these
  REQUIRE(added(around, R"({"add_bos_token": false})") == std::pair(false, true));
  REQUIRE(added("null", R"({"add_bos_token": true})") == std::pair(true, false));
  REQUIRE(added(around, "{}", 49152).first == false);  // SmolLM
}

TEST_CASE("the chat template is found in each of its places") {
  const auto found = [](const std::vector<std::pair<std::string, std::string>>& beside) {
    const auto file = Exported(Tokenizer(), beside).file();
    const auto* value = file.metadata().find("tokenizer.chat_template");
    return value == nullptr ? "none" : std::get<std::string>(*value);
  };
  const std::pair<std::string, std::string> plain{"tokenizer_config.json", R"({"chat_template": "plain"})"};
  REQUIRE(found({}) == "none");
  REQUIRE(found({plain}) == "plain");
  REQUIRE(found({plain, {"chat_template.jinja", "file\n"}}) == "file\n");
  REQUIRE(found({{"tokenizer_config.json", R"({"chat_template": [{"name": "tools", "template": "x"},
                                               {"name": "default", "template": "named"}]})"}}) == "named");
  REQUIRE(found({plain, {"chat_template.json", R"({"chat_template": "json"})"}}) == "json");
  REQUIRE_THROWS_WITH(found({{"tokenizer_config.json", R"({"chat_template": 3})"}}),
                      Contains("tokenizer_config.json") && Contains("expected a text, got 3"));
}

TEST_CASE("named chat templates stand beside the default one") {
  const auto check = [](const qat::io::GgufFile& file) {
    REQUIRE(file.get<std::string>("tokenizer.chat_template") == "plain");
    REQUIRE(file.get<std::string>("tokenizer.chat_template.tool_use") == "tools");
    REQUIRE(file.get<Strings>("tokenizer.chat_templates") == Strings{"rag", "tool_use"});
  };
  const std::string list =
      R"([{"name": "tool-use", "template": "tools"}, {"name": "default", "template": "plain"},
                               {"name": "rag", "template": "cite"}])";
  check(Exported(Tokenizer(), {{"tokenizer_config.json", R"({"chat_template": )" + list + "}"}}).file());
  check(Exported(Tokenizer(), {{"chat_template.jinja", "plain"},
                               {"additional_chat_templates/tool-use.jinja", "tools"},
                               {"additional_chat_templates/rag.jinja", "cite"},
                               {"additional_chat_templates/notes.txt", "no template"}})
            .file());
  const std::string twice = R"([{"name": "a-b", "template": "x"}, {"name": "a_b", "template": "y"}])";
  REQUIRE_THROWS_WITH(
      Exported(Tokenizer(), {{"tokenizer_config.json", R"({"chat_template": )" + twice + "}"}}).file(),
      Contains("got \"a_b\" again"));
}

TEST_CASE("a GGUF's tokenizer is taken over unchanged") {
  const tiny::Folder folder("source");
  const qat::io::GgufMetadata source = [] {
    qat::io::GgufMetadata metadata;
    metadata.set("general.architecture", std::string("any"));
    metadata.set("tokenizer.ggml.model", std::string("llama"));
    metadata.set("tokenizer.ggml.tokens", Strings{"a", "", "\xff", "d"});
    metadata.set("tokenizer.ggml.scores", std::vector<float>{0.5F, -1.0F, 0.0F, 2.0F});
    metadata.set("tokenizer.ggml.add_bos_token", true);
    metadata.set("tokenizer.odd", std::vector<uint16_t>{});
    return metadata;
  }();
  qat::io::write_gguf(folder.file("source"), source, {});
  auto checkpoint = tiny::checkpoint();
  qat::ExportOptions options;
  options.tokenizer_from = folder.file("source");  // goes before the checkpoint's own
  qat::export_checkpoint(checkpoint, folder.file("a"), "gguf", options);
  const qat::io::GgufFile file(folder.file("a"));
  REQUIRE(file.get<std::string>("general.architecture") == "llama");
  for (const auto& [key, value] : source) {
    if (key == "general.architecture") continue;
    REQUIRE(file.metadata().find(key) != nullptr);
    REQUIRE(*file.metadata().find(key) == value);
  }

  qat::io::GgufMetadata shorter = source;
  shorter.set("tokenizer.ggml.tokens", Strings{"a", "b", "c"});
  qat::io::write_gguf(folder.file("source"), shorter, {});
  REQUIRE_THROWS_WITH(qat::export_checkpoint(checkpoint, folder.file("a"), "gguf", options),
                      Contains("expected 4 tokens") && Contains("got 3"));
  REQUIRE_THROWS_AS(qat::export_checkpoint(checkpoint, folder.file("a"), "gguf", options),
                    qat::ArgumentError);
}

TEST_CASE("deeply nested JSON is refused like any other") {
  std::string deep;
  for (int i = 0; i < 200000; ++i) deep += R"({"type": "Sequence", "pretokenizers": [)";
  deep += "null";
  for (int i = 0; i < 200000; ++i) deep += "]}";
  Tokenizer tokenizer;
  tokenizer.pre = deep;
  REQUIRE_THAT(Exported(tokenizer).refusal(), Contains("pre_tokenizer"));
  tokenizer.pre = kGpt2;
  tokenizer.merges = "[" + deep + "]";
  REQUIRE_THAT(Exported(tokenizer).refusal(), Contains("model.merges[0]") && Contains("got an object"));
}
