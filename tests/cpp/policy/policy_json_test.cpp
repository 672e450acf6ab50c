// Reading and writing policies: every mistake is named by its JSON path.

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/policy/policy.hpp"

namespace {

using qat::ArgumentError;
using qat::Policy;

/// The message with which `json` is refused; fails the test when it is accepted or refused otherwise.
std::string refusal(const std::string& json) {
  try {
    Policy::from_json(json);
  } catch (const ArgumentError& error) {
    return error.what();
  }
  FAIL("accepted: " << json);
  return "";
}

std::string grids() {
  std::string text;
  for (std::string_view name : qat::grid::names()) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

/// A file that disappears with the test.
struct TemporaryFile {
  explicit TemporaryFile(const std::string& text) {
    path = std::filesystem::temp_directory_path() / ("qat_policy_" + std::to_string(::getpid()) + ".json");
    std::ofstream(path) << text;
  }
  ~TemporaryFile() { std::filesystem::remove(path); }
  std::filesystem::path path;
};

}  // namespace

TEST_CASE("a policy holds its rules in order") {
  const Policy policy = Policy::from_json(R"({"rules": [
    {"match": "a.*", "weight": "q4_0"},
    {"match": "b", "kind": "embedding", "weight": "int2_channel", "optional": true}],
    "estimator": {"kind": "clipped_ste"}})");
  REQUIRE(policy.name().empty());
  REQUIRE(policy.rules().size() == 2);
  REQUIRE(policy.rules()[0].match == "a.*");
  REQUIRE(policy.rules()[0].scheme.weight == "q4_0");
  REQUIRE_FALSE(policy.rules()[0].kind.has_value());
  REQUIRE_FALSE(policy.rules()[0].optional);
  REQUIRE(policy.rules()[1].kind == qat::SlotKind::kEmbedding);
  REQUIRE(policy.rules()[1].optional);
  REQUIRE(policy.estimator().kind == qat::EstimatorKind::kClippedSte);
}

TEST_CASE("canonical JSON sorts keys, leaves defaults out and reads back as the same policy") {
  const Policy policy = Policy::from_json(
      R"({"estimator": {"kind": "ste"}, "rules": [{"weight": "q4_0", "optional": false, "match": "x\\d"},
          {"weight": "f32", "optional": true, "kind": "conv", "match": "\"\u00e9"}]})");
  const std::string json = policy.to_json();
  REQUIRE(json ==
          "{\"rules\":[{\"match\":\"x\\\\d\",\"weight\":\"q4_0\"},"
          "{\"kind\":\"conv\",\"match\":\"\\\"\u00e9\",\"optional\":true,\"weight\":\"f32\"}]}");
  REQUIRE(Policy::from_json(json).to_json() == json);
  const std::string clipped = R"({"estimator":{"kind":"clipped_ste"},"rules":[]})";
  REQUIRE(Policy::from_json(clipped).to_json() == clipped);
}

TEST_CASE("every mistake in the document is named by its path") {
  REQUIRE(refusal("[]") == "policy: expected an object, got array");
  REQUIRE(refusal("{}") == "policy: expected the key \"rules\", got none");
  REQUIRE(refusal(R"({"rules": 1})") == "policy: rules: expected an array, got number");
  REQUIRE(refusal(R"({"rules": [], "rulez": []})") ==
          "policy: expected only the keys rules, estimator, kv_cache, activation_scales, got unknown key "
          "\"rulez\"");
  REQUIRE(refusal(R"({"rules": ["x"]})") == "policy: rules[0]: expected an object, got string");
  REQUIRE(refusal(R"({"rules": [{"weight": "q4_0"}]})") ==
          "policy: rules[0]: expected the key \"match\", got none");
  REQUIRE(refusal(R"({"rules": [{"match": "x"}]})") ==
          "policy: rules[0]: expected the key \"weight\", got none");
  REQUIRE(refusal(R"({"rules": [{"match": null, "weight": "q4_0"}]})") ==
          "policy: rules[0].match: expected a string, got null");
  REQUIRE(refusal(R"({"rules": [{"match": "x", "weight": 4}]})") ==
          "policy: rules[0].weight: expected a string, got number");
  REQUIRE(refusal(R"({"rules": [{"match": "x", "weight": "q4_0", "optional": "yes"}]})") ==
          "policy: rules[0].optional: expected true or false, got string");
  REQUIRE(refusal(R"({"rules": [{"match": "x", "weight": "q4_0", "bits": 4}]})") ==
          "policy: rules[0]: expected only the keys match, kind, weight, scale_grid, dequant_dtype, "
          "input, output, optional, estimator, got unknown key \"bits\"");
  REQUIRE(refusal(R"({"rules": [{"match": "x", "weight": "q4_0", "kind": "attention"}]})") ==
          "policy: rules[0].kind: expected one of linear, embedding, conv, other, got \"attention\"");
  REQUIRE(refusal(R"({"rules": [], "estimator": "ste"})") ==
          "policy: estimator: expected an object, got string");
  REQUIRE(refusal(R"({"rules": [], "estimator": {}})") ==
          "policy: estimator: expected the key \"kind\", got none");
  REQUIRE(refusal(R"({"rules": [], "estimator": {"kind": "lsq+"}})") ==
          "policy: estimator.kind: expected one of ste, clipped_ste, trust_mask, stable_qat, lsq, seq, got "
          "\"lsq+\"");
  REQUIRE(refusal(R"({"rules": [], "estimator": {"kind": "ste", "scale": "min"}})") ==
          "policy: estimator.scale: expected one of reference, search, differentiated, learned, seq, got "
          "\"min\"");
  REQUIRE(refusal(R"({"rules": [], "estimator": {"kind": "lsq", "scale": "search"}})") ==
          "policy: estimator.scale: expected \"learned\" for the kind lsq, or no such key, got \"search\"");
  REQUIRE(refusal(R"({"rules": [], "estimator": {"kind": "seq", "scale": "learned"}})") ==
          "policy: estimator.scale: expected \"seq\" for the kind seq, or no such key, got \"learned\"");
  REQUIRE(refusal(R"({"rules": [], "estimator": {"kind": "lsq", "scale_gradient": "row"}})") ==
          "policy: estimator.scale_gradient: expected one of lsq, tensor, plain, got \"row\"");
  REQUIRE(refusal(R"({"rules": [{"match": "x", "weight": "q4_0", "estimator": {"scale": "search"}}]})") ==
          "policy: rules[0].estimator: expected the key \"kind\", got none");
}

TEST_CASE("an estimator is read from its words, and written without its defaults") {
  using qat::Estimator, qat::EstimatorKind, qat::ScaleGradient, qat::ScaleRule;
  const auto read = [](const std::string& estimator) {
    return Policy::from_json(R"({"rules": [], "estimator": )" + estimator + "}");
  };
  const Policy lsq = read(R"({"kind": "lsq"})");
  REQUIRE(lsq.estimator() == Estimator{EstimatorKind::kClippedSte, ScaleRule::kLearned});
  REQUIRE(lsq.to_json() == R"({"estimator":{"kind":"clipped_ste","scale":"learned"},"rules":[]})");
  REQUIRE(read(R"({"kind": "lsq", "scale": "learned"})").to_json() == lsq.to_json());
  const Policy seq = read(R"({"kind": "seq", "scale_gradient": "plain"})");
  REQUIRE(seq.estimator() == Estimator{EstimatorKind::kClippedSte, ScaleRule::kSeq, ScaleGradient::kPlain});
  REQUIRE(read(R"({"kind": "clipped_ste", "scale": "seq", "scale_gradient": "plain"})").to_json() ==
          seq.to_json());
  const std::string full = R"({"kind":"trust_mask","scale":"differentiated","scale_gradient":"tensor"})";
  REQUIRE(read(full).estimator() ==
          Estimator{EstimatorKind::kTrustMask, ScaleRule::kDifferentiated, ScaleGradient::kTensor});
  REQUIRE(read(full).to_json() == R"({"estimator":)" + full + R"(,"rules":[]})");
  REQUIRE(read(R"({"kind": "stable_qat", "scale": "reference", "scale_gradient": "lsq"})").to_json() ==
          R"({"estimator":{"kind":"stable_qat"},"rules":[]})");
  REQUIRE(read(R"({"kind": "ste", "scale": "search"})").to_json() ==
          R"({"estimator":{"kind":"ste","scale":"search"},"rules":[]})");
}

TEST_CASE("an unknown grid is refused with all names, at the index of its rule") {
  REQUIRE(refusal(R"({"rules": [{"match": "a", "weight": "q4_0"}, {"match": "b", "weight": "f32"},
                                {"match": "c", "weight": "q4_9"}]})") ==
          "policy: rules[2].weight: expected one of " + grids() + ", got \"q4_9\"");
  REQUIRE_THAT(refusal(R"({"rules": [{"match": "a", "weight": "Q4_0"}]})"), Catch::EndsWith("got \"Q4_0\""));
}

TEST_CASE("options of a grid stand in its name or in keys, and canonical JSON writes the name") {
  const Policy policy = Policy::from_json(R"({"rules": [
    {"match": "a", "weight": "int4_g32", "scale_grid": "bf16", "dequant_dtype": "bf16"},
    {"match": "b", "weight": "int4_g32@fp16"},
    {"match": "c", "weight": "int4_g32", "scale_grid": "fp32", "dequant_dtype": "fp16"}]})");
  REQUIRE(policy.rules()[0].scheme.weight == "int4_g32@bf16:bf16");
  REQUIRE(policy.rules()[1].scheme.weight == "int4_g32@fp16");
  REQUIRE(policy.rules()[2].scheme.weight == "int4_g32:fp16");
  REQUIRE(policy.to_json() == R"({"rules":[{"match":"a","weight":"int4_g32@bf16:bf16"},)"
                              R"({"match":"b","weight":"int4_g32@fp16"},)"
                              R"({"match":"c","weight":"int4_g32:fp16"}]})");
  REQUIRE(Policy::from_json(policy.to_json()).to_json() == policy.to_json());
}

TEST_CASE("an option that the grid does not have is named by its path") {
  const auto rule = [](const std::string& keys) { return R"({"rules": [{"match": "a", )" + keys + "}]}"; };
  REQUIRE(refusal(rule(R"("weight": "int4_g32", "scale_grid": "f16")")) ==
          "policy: rules[0].scale_grid: expected one of fp32, fp16, bf16, bf16_fp16, pow2, got \"f16\"");
  REQUIRE(refusal(rule(R"("weight": "int4_g32", "dequant_dtype": "pow2")")) ==
          "policy: rules[0].dequant_dtype: expected one of fp32, fp16, bf16, got \"pow2\"");
  REQUIRE(refusal(rule(R"("weight": "int4_g32", "scale_grid": 4)")) ==
          "policy: rules[0].scale_grid: expected a string, got number");
  REQUIRE(refusal(rule(R"("weight": "q4_0", "scale_grid": "bf16")")) ==
          "policy: rules[0].scale_grid: expected no such key for q4_0, got \"bf16\"");
  REQUIRE(refusal(rule(R"("weight": "int4_g32@bf16", "dequant_dtype": "bf16")")) ==
          "policy: rules[0].dequant_dtype: expected options in keys or in the grid's name, got both, with "
          "\"int4_g32@bf16\"");
  REQUIRE(refusal(rule(R"("weight": "int4_g32@f8")")) ==
          "policy: rules[0].weight: expected a scale grid (behind \"@\") of int4_g32 that is one of "
          "fp32, fp16, bf16, bf16_fp16, pow2, got \"f8\"");
}

TEST_CASE("a bad expression is refused with the reason") {
  REQUIRE_THAT(
      refusal(R"({"rules": [{"match": "a(b", "weight": "q4_0"}]})"),
      Catch::StartsWith("policy: rules[0].match: expected an ECMAScript regular expression, got \"a(b\" ("));
  for (const char* bad : {"[a", "*", "a{2,1}", "\\\\1"}) {
    REQUIRE_THAT(refusal(R"({"rules": [{"match": ")" + std::string(bad) + R"(", "weight": "q4_0"}]})"),
                 Catch::StartsWith("policy: rules[0].match: expected an ECMAScript"));
  }
  const std::string deep(100'000, '(');
  REQUIRE(refusal(R"({"rules": [{"match": ")" + deep + R"(", "weight": "q4_0"}]})") ==
          "policy: rules[0].match: expected at most 4096 characters, got 100000");
}

TEST_CASE("text that is not JSON is refused and never crashes") {
  const std::vector<std::string> broken{"",
                                        "{",
                                        "{\"rules\": [}",
                                        "\xff\xfe",
                                        "nul",
                                        std::string(100'000, '['),
                                        "{}{}",
                                        "{\"rules\": [\"\xc3\"]}"};
  for (const std::string& text : broken) {
    const std::string message = refusal(text);
    REQUIRE_THAT(message, Catch::StartsWith("policy: expected JSON, got a parse error at line "));
    for (char c : message) REQUIRE((c >= 0x20 && c < 0x7f));
  }
  const std::string nested = "{\"rules\": " + std::string(50'000, '[') + std::string(50'000, ']') + "}";
  REQUIRE(refusal(nested) == "policy: rules[0]: expected an object, got array");
}

TEST_CASE("a key given twice is refused instead of silently overwritten") {
  REQUIRE(refusal(R"({"rules": [{"match": "a", "weight": "q4_0", "match": "b"}]})") ==
          "policy: expected each key once, got \"match\" twice in one object");
}

TEST_CASE("a policy file: its path is the name, and stands in each message") {
  const TemporaryFile good(R"({"rules": [{"match": ".*", "weight": "q8_0"}]})");
  REQUIRE(Policy::from_file(good.path).name() == good.path);
  REQUIRE(Policy::load(good.path).rules().size() == 1);
  const TemporaryFile bad(R"({"rules": [{"match": ".*", "weight": "q7_0"}]})");
  REQUIRE_THROWS_AS(Policy::load(bad.path), ArgumentError);
  REQUIRE_THROWS_WITH(Policy::load(bad.path), Catch::StartsWith("policy: " + bad.path.string() +
                                                                ": rules[0].weight: expected one of"));
}

TEST_CASE("a policy file that cannot be read is a FileError") {
  REQUIRE_THROWS_AS(Policy::from_file("/nonexistent/p.json"), qat::FileError);
  REQUIRE_THROWS_WITH(Policy::load("missing.json"),
                      "policy: missing.json: expected a readable policy file, got none");
  REQUIRE_THROWS_AS(Policy::from_file("/"), qat::FileError);
  const TemporaryFile large(std::string((1 << 20) + 1, ' '));
  REQUIRE_THROWS_AS(Policy::from_file(large.path), qat::FileError);
  REQUIRE_THROWS_WITH(Policy::from_file(large.path), Catch::EndsWith("got more than 1048576 bytes"));
}

TEST_CASE("presets load by name, and an unknown one is refused with the names") {
  const std::vector<std::string_view> expected{
      "gguf-q4_0",         "gguf-q8_0",         "gguf-q2_0-mixed", "ct-w4a16",     "mlx-4bit", "gemma4-q4_0",
      "gemma4-e2b-mobile", "gemma4-e4b-mobile", "int4-channel",    "int2-channel", "int4-g32", "int2-g32"};
  REQUIRE(Policy::presets() == expected);
  for (std::string_view name : expected) {
    REQUIRE(Policy::load(std::string(name)).name() == name);
    REQUIRE(Policy::from_json(Policy::preset(name).to_json()).to_json() == Policy::preset(name).to_json());
    REQUIRE_FALSE(Policy::preset_summary(name).empty());
  }
  REQUIRE_THROWS_AS(Policy::load("gguf-q4"), ArgumentError);
  const std::string refusal =
      "policy: preset: expected one of gguf-q4_0, gguf-q8_0, gguf-q2_0-mixed, ct-w4a16, mlx-4bit, "
      "gemma4-q4_0, gemma4-e2b-mobile, gemma4-e4b-mobile, int4-channel, int2-channel, int4-g32, int2-g32, "
      "got \"gguf-q4\"";
  REQUIRE_THROWS_WITH(Policy::load("gguf-q4"), refusal);
  REQUIRE_THROWS_WITH(Policy::preset_summary("gguf-q4"), refusal);
}
