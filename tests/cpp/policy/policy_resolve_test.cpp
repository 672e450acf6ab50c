// Which tensor goes to which grid.

#include <random>
#include <regex>
#include <string>
#include <vector>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/policy/policy.hpp"

namespace {

using qat::ArgumentError;
using qat::Policy;
using qat::SlotKind;
using qat::Target;

std::vector<std::string> grids_of(const Policy& policy, const std::vector<Target>& targets) {
  std::vector<std::string> grids;
  for (const qat::Scheme& scheme : policy.resolve(targets)) grids.push_back(scheme.weight);
  return grids;
}

std::string refusal(const Policy& policy, const std::vector<Target>& targets) {
  try {
    policy.resolve(targets);
  } catch (const ArgumentError& error) {
    return error.what();
  }
  FAIL("resolved");
  return "";
}

Target linear(const std::string& name, int64_t out = 8, int64_t in = 64) {
  return {name, SlotKind::kLinear, {out, in}};
}

/// The weights of a small Llama as Hugging Face names them, under `prefix`.
std::vector<Target> llama(const std::string& prefix, bool head) {
  std::vector<Target> targets{{prefix + "embed_tokens.weight", SlotKind::kEmbedding, {128, 64}}};
  for (const char* layer : {"layers.0.", "layers.11."}) {
    for (const char* part : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}) {
      targets.push_back(linear(prefix + layer + part + ".weight"));
    }
  }
  if (head) targets.push_back(linear("lm_head.weight", 128));
  return targets;
}

}  // namespace

TEST_CASE("the first rule that matches wins, and the rest stays float") {
  const Policy policy = Policy::from_json(R"({"rules": [
    {"match": "block\\.1\\..*", "weight": "q8_0"}, {"match": "block\\..*", "weight": "q4_0"}]})");
  REQUIRE(grids_of(policy, {linear("block.0.up.weight"), linear("block.1.up.weight"),
                            linear("head.weight")}) == std::vector<std::string>{"q4_0", "q8_0", "f32"});
}

TEST_CASE("a match is a full match on the name without one trailing .weight") {
  const Policy policy = Policy::from_json(R"({"rules": [{"match": "up", "weight": "q4_0"}]})");
  const auto grids = grids_of(policy, {linear("up.weight"), linear("up"), linear("up.weight.weight"),
                                       linear("xup"), linear("upx"), linear("up.bias"), linear("UP")});
  REQUIRE(grids == std::vector<std::string>{"q4_0", "q4_0", "f32", "f32", "f32", "f32", "f32"});
}

TEST_CASE("a kind narrows a rule") {
  const Policy policy = Policy::from_json(
      R"({"rules": [{"match": ".*", "kind": "conv", "weight": "int4_channel"},
                    {"match": ".*", "kind": "linear", "weight": "int8_channel"}]})");
  REQUIRE(grids_of(policy, {{"a", SlotKind::kConv, {4, 3, 3, 3}},
                            linear("a", 4, 7),
                            {"a", SlotKind::kEmbedding, {4, 7}},
                            {"a", SlotKind::kOther, {4, 7}}}) ==
          std::vector<std::string>{"int4_channel", "int8_channel", "f32", "f32"});
}

TEST_CASE("a rule that matches nothing is an error unless optional") {
  const std::vector<Target> targets{linear("a"), linear("b"), linear("c"), linear("d")};
  const Policy strict = Policy::from_json(
      R"({"rules": [{"match": "a", "weight": "q4_0"}, {"match": "lm_heda", "weight": "q8_0"}]})");
  REQUIRE(refusal(strict, targets) ==
          "policy: rules[1].match: expected to match a tensor, or \"optional\": true, got \"lm_heda\", which "
          "matches none of 4 tensors (a, b, c, ...)");
  REQUIRE_THAT(refusal(strict, {linear("a")}), Catch::EndsWith("none of 1 tensor (a)"));
  REQUIRE_THAT(refusal(strict, {}), Catch::EndsWith("none of 0 tensors"));
  const Policy lenient = Policy::from_json(
      R"({"rules": [{"match": "a", "weight": "q4_0"}, {"match": "lm_heda", "weight": "q8_0", "optional": true}]})");
  REQUIRE(grids_of(lenient, targets).front() == "q4_0");
}

TEST_CASE("a rule of the wrong kind matches nothing") {
  const Policy policy =
      Policy::from_json(R"({"rules": [{"match": "a", "kind": "conv", "weight": "int4_channel"}]})");
  REQUIRE_THAT(refusal(policy, {linear("a")}), Catch::Contains("rules[0].match"));
}

TEST_CASE("a rule whose tensors all go to earlier rules is an error of its own") {
  const std::string rules =
      R"({"rules": [{"match": ".*", "weight": "q4_0"}, {"match": "a", "weight": "q8_0")";
  REQUIRE(
      refusal(Policy::from_json(rules + "}]}"), {linear("a")}) ==
      "policy: rules[1].match: expected a tensor that no earlier rule matches, got \"a\", whose tensors all "
      "go to earlier rules (such as rules[0])");
  REQUIRE(grids_of(Policy::from_json(rules + R"(, "optional": true}]})"), {linear("a")}).front() == "q4_0");
}

TEST_CASE("a width that the block does not divide names tensor, width and block") {
  const Policy policy = Policy::from_json(R"({"rules": [{"match": ".*", "weight": "q4_0"}]})");
  REQUIRE(
      refusal(policy, {linear("ok"), linear("layers.0.up.weight", 4, 100)}) ==
      "policy: layers.0.up.weight: expected a width that is a multiple of 32 (the block of q4_0), got 100 "
      "(shape [4, 100])");
  // A row is everything after dimension 0: 16 * 3 * 3 = 144 does not divide, 32 * 3 * 3 does.
  REQUIRE_THAT(refusal(policy, {{"conv", SlotKind::kConv, {4, 16, 3, 3}}}), Catch::Contains("got 144"));
  REQUIRE(grids_of(policy, {{"conv", SlotKind::kConv, {4, 32, 3, 3}}}).front() == "q4_0");
}

TEST_CASE("shapes that have no rows are refused on integer grids and harmless on float ones") {
  const Policy integer = Policy::from_json(R"({"rules": [{"match": ".*", "weight": "int4_channel"}]})");
  const int64_t huge = int64_t{1} << 40;
  const std::vector<std::vector<int64_t>> shapes{{}, {8}, {0, 8}, {8, 0}, {-1, 8}, {8, -1}, {2, huge, huge}};
  for (const auto& shape : shapes) {
    REQUIRE_THAT(
        refusal(integer, {{"w", SlotKind::kOther, shape}}),
        Catch::StartsWith("policy: w: expected a weight of 2 or more dimensions, all of them positive"));
  }
  const Policy floats = Policy::from_json(R"({"rules": [{"match": ".*", "weight": "bf16"}]})");
  REQUIRE(grids_of(floats, {{"norm", SlotKind::kOther, {7}}}).front() == "bf16");
}

TEST_CASE("names and expressions that would exhaust the stack are refused") {
  const Policy policy = Policy::from_json(R"({"rules": [{"match": "((a|b)*)*c", "weight": "q4_0"}]})");
  REQUIRE_THAT(refusal(policy, {linear(std::string(1'000'000, 'c'))}),
               Catch::Contains("expected a name of at most 1024 characters, got 1000000"));
  const Policy any = Policy::from_json(R"({"rules": [{"match": "((.|x)*\\.?)*", "weight": "q4_0"}]})");
  REQUIRE(grids_of(any, {linear(std::string(1024, 'c'))}).front() == "q4_0");
}

TEST_CASE("the gguf presets follow llama.cpp's recipe, with any of the usual prefixes") {
  for (const std::string prefix : {"model.", "", "model.language_model.", "language_model.model."}) {
    for (bool head : {false, true}) {
      const std::vector<Target> targets = llama(prefix, head);
      const auto q4 = grids_of(Policy::preset("gguf-q4_0"), targets);
      const auto q8 = grids_of(Policy::preset("gguf-q8_0"), targets);
      for (size_t i = 0; i < targets.size(); ++i) {
        const bool matrix = targets[i].name.find("_proj") != std::string::npos;
        REQUIRE(q4[i] == (matrix ? "q4_0" : "q8_0"));
        REQUIRE(q8[i] == "q8_0");
      }
    }
  }
  std::vector<Target> bert{linear("encoder.layer.0.attention.self.query.weight")};
  REQUIRE_THAT(refusal(Policy::preset("gguf-q4_0"), bert), Catch::Contains("rules[0].match"));
}

TEST_CASE("the presets of the other consumers, with any of the usual prefixes") {
  for (const std::string prefix : {"model.", "", "model.language_model.", "language_model.model."}) {
    const std::vector<Target> targets = llama(prefix, true);
    const auto q2 = grids_of(Policy::preset("gguf-q2_0-mixed"), targets);
    const auto ct = grids_of(Policy::preset("ct-w4a16"), targets);
    const auto mlx = grids_of(Policy::preset("mlx-4bit"), targets);
    for (size_t i = 0; i < targets.size(); ++i) {
      const bool matrix = targets[i].name.find("_proj") != std::string::npos;
      const bool mlp = targets[i].name.find(".mlp.") != std::string::npos;
      REQUIRE(q2[i] == (mlp ? "q2_0" : matrix ? "q4_0" : "q8_0"));
      REQUIRE(ct[i] == (matrix ? "int4_g32@bf16:bf16" : "bf16"));
      REQUIRE(mlx[i] == "mlx4_g64@bf16");
    }
  }
  REQUIRE(Policy::preset("gguf-q2_0-mixed").estimator().scale == qat::ScaleRule::kSearch);
}

TEST_CASE("the mobile presets follow Google's recipe layer by layer") {
  const std::string prefix = "model.language_model.";
  std::vector<Target> targets{{prefix + "embed_tokens.weight", SlotKind::kEmbedding, {8, 256}},
                              {prefix + "embed_tokens_per_layer.weight", SlotKind::kEmbedding, {8, 512}},
                              linear("lm_head.weight", 8, 256)};
  for (int layer = 0; layer < 35; ++layer) {
    const std::string block = prefix + "layers." + std::to_string(layer) + ".";
    targets.push_back(linear(block + "mlp.down_proj.weight", 256, 256));
  }
  const std::string last = prefix + "layers.34.";
  for (const char* name : {"self_attn.k_proj", "per_layer_input_gate", "per_layer_projection"}) {
    targets.push_back(linear(last + name + ".weight", 256, 256));
  }
  const auto e2b = grids_of(Policy::preset("gemma4-e2b-mobile"), targets);
  const auto e4b = grids_of(Policy::preset("gemma4-e4b-mobile"), targets);
  REQUIRE(std::vector(e2b.begin(), e2b.begin() + 3) ==
          std::vector<std::string>{"mobile2", "mobile4_g256", "mobile2"});
  REQUIRE(std::vector(e4b.begin(), e4b.begin() + 3) ==
          std::vector<std::string>{"mobile2", "mobile2_g256", "mobile2"});
  for (size_t layer = 0; layer < 35; ++layer) {
    REQUIRE(e2b[3 + layer] == (layer < 15 ? "mobile4" : "mobile2"));
    REQUIRE(e4b[3 + layer] == "mobile4");
  }
  REQUIRE(std::vector(e2b.end() - 3, e2b.end()) == std::vector<std::string>{"mobile4", "mobile8", "mobile8"});
  REQUIRE(std::vector(e4b.end() - 3, e4b.end()) == std::vector<std::string>{"mobile4", "mobile8", "mobile8"});
}

TEST_CASE("the Q4_0 preset of Gemma 4 has Google's types") {
  const std::string prefix = "model.layers.3.";
  const std::vector<Target> targets{
      {"model.embed_tokens.weight", SlotKind::kEmbedding, {8, 256}},
      {"model.embed_tokens_per_layer.weight", SlotKind::kEmbedding, {8, 512}},
      linear("model.per_layer_model_projection.weight", 512, 256),
      linear(prefix + "per_layer_input_gate.weight", 256, 256),
      linear(prefix + "per_layer_projection.weight", 256, 256),
      linear(prefix + "self_attn.o_proj.weight", 256, 256),
      linear(prefix + "mlp.gate_proj.weight", 256, 256),
      linear(prefix + "experts.gate_up_proj", 512, 704),
      linear(prefix + "experts.down_proj", 256, 704),
      linear(prefix + "router.proj.weight", 4, 256),
  };
  REQUIRE(grids_of(Policy::preset("gemma4-q4_0"), targets) ==
          std::vector<std::string>{"q6_k", "q6_k", "bf16", "q4_0", "q4_0", "q4_0", "q4_0", "q4_0", "q4_0",
                                   "f32"});
}

TEST_CASE("the channel presets take every linear and convolution, of any width") {
  for (const auto& [name, grid] :
       {std::pair{"int4-channel", "int4_channel"}, {"int2-channel", "int2_channel"}}) {
    REQUIRE(grids_of(Policy::preset(name), {linear("fc", 10, 13),
                                            {"conv", SlotKind::kConv, {5, 1, 3, 3}},
                                            {"embed_tokens", SlotKind::kEmbedding, {9, 4}}}) ==
            std::vector<std::string>{grid, grid, "f32"});
  }
}

TEST_CASE("the group presets take every linear, and name one whose width no group divides") {
  for (const auto& [name, grid] : {std::pair{"int4-g32", "int4_g32"}, {"int2-g32", "int2_g32"}}) {
    const Policy policy = Policy::preset(name);
    REQUIRE(grids_of(policy, {linear("fc", 10, 64),
                              {"conv", SlotKind::kConv, {5, 1, 3, 3}},
                              {"embed_tokens", SlotKind::kEmbedding, {9, 64}}}) ==
            std::vector<std::string>{grid, "f32", "f32"});
    REQUIRE_THAT(refusal(policy, {linear("fc", 10, 13)}),
                 Catch::Contains("fc: expected a width that is a multiple of 32"));
    REQUIRE_THAT(refusal(policy, {{"conv", SlotKind::kConv, {5, 1, 3, 3}}}), Catch::Contains("rules[0]"));
  }
}

TEST_CASE("resolve equals a plain search over the rules, on random policies") {
  std::mt19937 random(7);
  const std::vector<std::string> expressions{".*",       "a.*", ".*b", "a\\.[0-3]\\..*", "(a|c)\\.\\d+\\.b",
                                             "c\\.2\\.a"};
  const std::vector<std::string> grids{"q4_0", "q8_0", "int4_channel", "f32"};
  for (int round = 0; round < 50; ++round) {
    std::string rules;
    std::vector<std::pair<std::string, std::string>> plain;
    for (int i = 0; i < 3; ++i) {
      plain.emplace_back(expressions[random() % expressions.size()], grids[random() % grids.size()]);
      std::string match = plain.back().first;
      for (size_t at = 0; (at = match.find('\\', at)) != std::string::npos; at += 2) match.insert(at, "\\");
      if (i > 0) rules += ",";
      rules += R"({"optional": true, "match": ")" + match + R"(", "weight": ")" + plain.back().second + "\"}";
    }
    std::vector<Target> targets;
    std::vector<std::string> expected;
    for (int i = 0; i < 20; ++i) {
      const std::vector<std::string> words{"a", "b", "c", "0", "2", "4"};
      std::string name = words[random() % 3];
      name.append(".").append(words[3 + random() % 3]).append(".").append(words[random() % 3]);
      targets.push_back(linear(name + ".weight"));
      expected.push_back("f32");
      for (const auto& [match, grid] : plain) {
        if (!std::regex_match(name, std::regex(match))) continue;
        expected.back() = grid;
        break;
      }
    }
    REQUIRE(grids_of(Policy::from_json("{\"rules\": [" + rules + "]}"), targets) == expected);
  }
}

TEST_CASE("a rule's own estimator serves its tensors, the policy's the others") {
  using qat::Estimator, qat::EstimatorKind, qat::ScaleRule;
  const Policy policy = Policy::from_json(R"({"rules": [
      {"match": "a", "weight": "q4_0", "estimator": {"kind": "lsq"}},
      {"match": "b", "weight": "q8_0"}],
      "estimator": {"kind": "clipped_ste", "scale": "search"}})");
  REQUIRE(Policy::from_json(policy.to_json()).to_json() == policy.to_json());
  const std::vector<qat::Target> targets{{"c.weight", qat::SlotKind::kLinear, {4, 32}},
                                         {"b.weight", qat::SlotKind::kLinear, {4, 32}},
                                         {"a.weight", qat::SlotKind::kLinear, {4, 32}}};
  const Estimator own{EstimatorKind::kClippedSte, ScaleRule::kLearned};
  const Estimator common{EstimatorKind::kClippedSte, ScaleRule::kSearch};
  REQUIRE(policy.estimators(targets) == std::vector{common, common, own});
  const Estimator other{EstimatorKind::kSte, ScaleRule::kLearned};
  REQUIRE(policy.with_estimator(other).estimators(targets) == std::vector{other, other, other});
  REQUIRE(policy.with_estimator(other).rules().size() == 2);
  Estimator rule_reference = own, common_reference = common;
  rule_reference.scale = common_reference.scale = ScaleRule::kReference;
  REQUIRE(policy.with_scale(ScaleRule::kReference).estimators(targets) ==
          std::vector{common_reference, common_reference, rule_reference});
  REQUIRE_THROWS_AS(policy.estimators({}), qat::ArgumentError);
}

TEST_CASE("a differentiated scale needs a rule that has a gradient") {
  const auto estimators = [](const std::string& grid, int64_t width) {
    return Policy::from_json(R"({"rules": [{"match": "a", "weight": ")" + grid +
                             R"("}], "estimator": {"kind": "ste", "scale": "differentiated"}})")
        .estimators({{"a.weight", qat::SlotKind::kLinear, {4, width}}});
  };
  REQUIRE(estimators("q4_0", 32).size() == 1);
  REQUIRE(estimators("bf16", 32).size() == 1);
  REQUIRE_THROWS_WITH(estimators("q4_k", 256),
                      "policy: a.weight: expected a grid whose scale rule has a gradient for the scale rule "
                      "differentiated, got q4_k");
}

TEST_CASE("seq needs a grid that holds its levels, or one without scales") {
  const auto estimators = [](const std::string& grid) {
    return Policy::from_json(R"({"rules": [{"match": "a", "weight": ")" + grid +
                             R"("}], "estimator": {"kind": "seq"}})")
        .estimators({{"a.weight", qat::SlotKind::kLinear, {4, 256}}});
  };
  for (const char* grid : {"q2_k", "mlx2_g128@fp16", "mlx3_g32", "mlx4_g64@bf16", "bf16", "f32"}) {
    REQUIRE(estimators(grid).front().scale == qat::ScaleRule::kSeq);
  }
  for (const char* grid : {"q4_0", "q3_k", "mlx5_g64", "int2_g64"}) {
    REQUIRE_THROWS_WITH(
        estimators(grid),
        Catch::StartsWith("policy: a.weight: expected a grid that holds the levels of seq (") &&
            Catch::Contains("mlx2_g32") && Catch::Contains("q2_k") &&
            Catch::EndsWith(std::string("got ") + grid));
  }
}
