#include "qat/arch/layers.hpp"

#include <map>
#include <set>
#include <string>

#include "catch.hpp"
#include "qat/core/error.hpp"

using Catch::Contains;
using namespace qat::arch;

namespace {

using Fields = std::map<std::string, ConfigValue>;

const Family& gemma3() {
  return find_by_model_type("gemma3_text");
}
const Family& gemma4() {
  return find_by_model_type("gemma4_text");
}

/// A lookup that owns its fields; an object is there when one of its members is.
ConfigLookup lookup_of(const Family& family, Fields fields) {
  return decoder_lookup(family, [fields = std::move(fields)](std::string_view path) -> ConfigValue {
    const auto found = fields.find(std::string(path));
    if (found != fields.end()) return found->second;
    const auto member = fields.lower_bound(std::string(path) + ".");
    const bool object = member != fields.end() && member->first.starts_with(std::string(path) + ".");
    return object ? ConfigValue(true) : ConfigValue();
  });
}

ModelShape shape_of(const Family& family, Fields fields) {
  return read_shape(family, lookup_of(family, std::move(fields)));
}

template <class Error>
std::string message_of(const Family& family, Fields fields) {
  try {
    shape_of(family, std::move(fields));
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

void add_layer_types(Fields& fields, const std::string& kinds) {
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    fields["layer_types." + std::to_string(i)] =
        std::string(kinds[i] == 's' ? "sliding_attention" : "full_attention");
  }
}

/// The published configuration of Gemma 4 E2B.
Fields e2b() {
  Fields fields{{"num_hidden_layers", 35.0},
                {"hidden_size", 1536.0},
                {"intermediate_size", 6144.0},
                {"num_attention_heads", 8.0},
                {"num_key_value_heads", 1.0},
                {"head_dim", 256.0},
                {"global_head_dim", 512.0},
                {"sliding_window", 512.0},
                {"num_kv_shared_layers", 20.0},
                {"use_double_wide_mlp", true},
                {"hidden_size_per_layer_input", 256.0}};
  add_layer_types(fields, "ssssfssssfssssfssssfssssfssssfssssf");
  return fields;
}

/// That of Gemma 4 26B-A4B.
Fields moe() {
  Fields fields{
      {"num_hidden_layers", 30.0},   {"hidden_size", 2816.0},          {"intermediate_size", 2112.0},
      {"num_attention_heads", 16.0}, {"num_key_value_heads", 8.0},     {"num_global_key_value_heads", 2.0},
      {"head_dim", 256.0},           {"global_head_dim", 512.0},       {"sliding_window", 1024.0},
      {"attention_k_eq_v", true},    {"enable_moe_block", true},       {"num_experts", 128.0},
      {"top_k_experts", 8.0},        {"moe_intermediate_size", 704.0}, {"hidden_size_per_layer_input", 0.0}};
  return fields;
}

int64_t count(const Family& family, const ModelShape& shape) {
  int64_t tensors = 0;
  for (const TensorRule& rule : family.tensors) {
    const bool per_layer = rule.hf.find("{i}") != std::string_view::npos;
    for (std::size_t i = 0; i < (per_layer ? shape.layers.size() : 1); ++i) {
      const auto layer = per_layer ? std::optional(static_cast<int64_t>(i)) : std::nullopt;
      tensors += presence(rule, shape, layer) == Presence::kRequired ? 1 : 0;
    }
  }
  return tensors;
}

}  // namespace

TEST_CASE("Gemma 4 E2B: windows, shared keys and wide layers as published") {
  const ModelShape shape = shape_of(gemma4(), e2b());
  REQUIRE(shape.layers.size() == 35);
  REQUIRE(shape.layers[13] == LayerShape{true, 256, 1, 6144, 13, false});
  REQUIRE(shape.layers[14] == LayerShape{false, 512, 1, 6144, 14, false});
  REQUIRE(shape.layers[15] == LayerShape{true, 256, 1, 12288, 13, false});
  REQUIRE(shape.layers[19] == LayerShape{false, 512, 1, 12288, 14, false});
  REQUIRE(shape.layers[34] == LayerShape{false, 512, 1, 12288, 14, false});
  REQUIRE(shape.sliding_window == 512);
  REQUIRE(shape.layer_inputs == 256);
  REQUIRE(shape.experts == 0);
  REQUIRE(full_every(shape) == 5);
  // The published GGUF holds 541 tensors: 17 for each layer and 5 outside, without the keys, values and key
  // norms of 20 layers, and rope_freqs.
  REQUIRE(count(gemma4(), shape) == 35 * 17 + 5 - 20 * 3);
}

TEST_CASE("Gemma 4 26B: experts, and values that are keys") {
  const ModelShape shape = shape_of(gemma4(), moe());
  REQUIRE(shape.layers[4] == LayerShape{true, 256, 8, 2112, 4, false});
  REQUIRE(shape.layers[5] == LayerShape{false, 512, 2, 2112, 5, true});
  REQUIRE(shape.experts == 128);
  REQUIRE(shape.experts_per_token == 8);
  REQUIRE(shape.expert_feed_forward == 704);
  // The published GGUF holds 658 tensors, one of them rope_freqs.
  REQUIRE(count(gemma4(), shape) == 657);
}

TEST_CASE("what transformers 5 writes says the same as published files") {
  Fields fields = moe();
  fields.erase("global_head_dim");
  fields.erase("num_global_key_value_heads");
  for (int layer = 5; layer < 30; layer += 6) {
    const std::string prefix = "per_layer_config." + std::to_string(layer) + ".";
    fields[prefix + "head_dim"] = 512.0;
    fields[prefix + "num_key_value_heads"] = 2.0;
  }
  REQUIRE(shape_of(gemma4(), fields).layers == shape_of(gemma4(), moe()).layers);

  fields = moe();
  fields.erase("global_head_dim");  // 512 unless something is said
  REQUIRE(shape_of(gemma4(), fields).layers[5].head_dim == 512);
  fields["per_layer_config"] = true;  // an object without members: nothing differs
  REQUIRE(shape_of(gemma4(), fields).layers[5] == LayerShape{false, 256, 8, 2112, 5, true});

  fields = moe();
  fields["attention_k_eq_v"] = false;  // then the number for full layers does not count
  REQUIRE(shape_of(gemma4(), fields).layers[5] == LayerShape{false, 512, 8, 2112, 5, false});
}

TEST_CASE("the decoder of a model with more than text is its text_config, completed by defaults") {
  Fields nested{{"model_type", std::string("gemma3")},
                {"text_config.model_type", std::string("gemma3_text")}};
  for (const auto& [key, value] : Fields{{"num_hidden_layers", 34.0},
                                         {"hidden_size", 2560.0},
                                         {"intermediate_size", 10240.0},
                                         {"sliding_window", 1024.0}}) {
    nested["text_config." + key] = value;  // all that the published 4B says
  }
  const ModelShape shape = shape_of(gemma3(), nested);
  REQUIRE(shape.layers.size() == 34);
  REQUIRE(shape.layers[4] == LayerShape{true, 256, 4, 10240, 4, false});
  REQUIRE(shape.layers[5] == LayerShape{false, 256, 4, 10240, 5, false});
  REQUIRE(shape.sliding_window == 1024);
  REQUIRE(full_every(shape) == 6);
  REQUIRE(attention_scalar(shape, 2560, 8) == 256);
}

TEST_CASE("Gemma 3 27B divides queries by another number") {
  const ModelShape shape = shape_of(gemma3(), {{"num_hidden_layers", 62.0},
                                               {"hidden_size", 5376.0},
                                               {"intermediate_size", 21504.0},
                                               {"num_attention_heads", 32.0},
                                               {"num_key_value_heads", 16.0},
                                               {"head_dim", 128.0}});
  REQUIRE(attention_scalar(shape, 5376, 32) == 168);
}

TEST_CASE("periods and lists of layers") {
  Fields fields{{"num_hidden_layers", 4.0},     {"hidden_size", 64.0},        {"intermediate_size", 64.0},
                {"num_attention_heads", 4.0},   {"num_key_value_heads", 4.0}, {"sliding_window", 32.0},
                {"sliding_window_pattern", 2.0}};
  REQUIRE(full_every(shape_of(gemma3(), fields)) == 2);
  fields["sliding_window_pattern"] = 1.0;
  REQUIRE(full_every(shape_of(gemma3(), fields)) == 1);
  REQUIRE(shape_of(gemma3(), fields).sliding_window == 0);
  add_layer_types(fields, "sfss");
  REQUIRE(full_every(shape_of(gemma3(), fields)) == 0);
  add_layer_types(fields, "ssss");
  REQUIRE(full_every(shape_of(gemma3(), fields)) == 5);
  REQUIRE_FALSE(shape_of(gemma4(), fields).layers.back().sliding);  // as transformers forces it
}

TEST_CASE("models without windows read as before") {
  const ModelShape shape = shape_of(find_by_model_type("llama"), {{"num_hidden_layers", 2.0},
                                                                  {"hidden_size", 64.0},
                                                                  {"intermediate_size", 128.0},
                                                                  {"num_attention_heads", 4.0}});
  REQUIRE(shape.layers[1] == LayerShape{false, 16, 4, 128, 1, false});
  REQUIRE(shape.sliding_window == 0);
}

TEST_CASE("layers that make no model are refused with their key") {
  const auto changed = [](const std::string& key, ConfigValue value) {
    Fields fields = e2b();
    fields[key] = std::move(value);
    return fields;
  };
  using qat::ArgumentError;
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("num_hidden_layers", 36.0)),
               Contains("\"layer_types.35\": expected the kind of each of 36 layers, got nothing"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("num_hidden_layers", 34.0)),
               Contains("\"layer_types.34\": expected 34 layers"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("num_hidden_layers", 1e9)),
               Contains("\"num_hidden_layers\": expected at most"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("num_hidden_layers", 2.5)),
               Contains("\"num_hidden_layers\": expected a whole number above 0"));
  REQUIRE_THAT(
      message_of<qat::UnsupportedError>(gemma4(), changed("layer_types.3", std::string("linear_attention"))),
      Contains("\"layer_types.3\"") && Contains("linear_attention"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("num_key_value_heads", 3.0)),
               Contains("\"num_key_value_heads\": expected a divisor of num_attention_heads 8"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("num_kv_shared_layers", 31.0)),
               Contains("\"num_kv_shared_layers\": expected an unshared layer of each kind"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("num_kv_shared_layers", 35.0)),
               Contains("\"num_kv_shared_layers\""));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("num_kv_shared_layers", -1.0)),
               Contains("\"num_kv_shared_layers\": expected a whole number"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("use_double_wide_mlp", 1.0)),
               Contains("\"use_double_wide_mlp\": expected true or false"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("enable_moe_block", true)),
               Contains("\"num_experts\": expected a whole number, got nothing"));
  REQUIRE_THAT(message_of<ArgumentError>(gemma4(), changed("per_layer_config.3.head_dim", std::string("x"))),
               Contains("\"per_layer_config.3.head_dim\""));
}

TEST_CASE("rotary embeddings by kind of layer, in both spellings") {
  const auto ropes = [](Fields fields) {
    return read_ropes(gemma3(), lookup_of(gemma3(), std::move(fields)));
  };
  const Ropes usual = ropes({});
  REQUIRE(usual.full.theta == 1e6);
  REQUIRE(usual.sliding.theta == 1e4);
  const Ropes old = ropes({{"rope_theta", 5e5},
                           {"rope_local_base_freq", 2e4},
                           {"rope_scaling.rope_type", std::string("linear")},
                           {"rope_scaling.factor", 8.0}});
  const Ropes current = ropes({{"rope_parameters.full_attention.rope_theta", 5e5},
                               {"rope_parameters.full_attention.rope_type", std::string("linear")},
                               {"rope_parameters.full_attention.factor", 8.0},
                               {"rope_parameters.sliding_attention.rope_theta", 2e4}});
  REQUIRE(old.full == Rope{.theta = 5e5, .type = RopeType::kLinear, .factor = 8.0});
  REQUIRE(old.full == current.full);
  REQUIRE(old.sliding == current.sliding);
  REQUIRE(old.sliding == Rope{.theta = 2e4});

  const Ropes gemma = read_ropes(gemma4(), lookup_of(gemma4(), {}));
  REQUIRE(gemma.full == Rope{.theta = 1e6, .type = RopeType::kProportional, .share = 0.25});
  REQUIRE_THROWS_WITH(
      read_ropes(
          gemma4(),
          lookup_of(gemma4(), {{"rope_parameters.full_attention.rope_type", std::string("proportional")},
                               {"rope_parameters.full_attention.partial_rotary_factor", 1.5}})),
      Contains("\"partial_rotary_factor\": expected a number from 0 to 1"));
}

TEST_CASE("a quarter of the pairs turns: the divisors of Gemma 4, and the way back") {
  const Rope rope{.theta = 1e6, .type = RopeType::kProportional, .share = 0.25};
  const std::vector<double> divisors = rope_divisors(rope, 512);
  REQUIRE(divisors.size() == 256);
  REQUIRE(std::vector<double>(divisors.begin(), divisors.begin() + 64) == std::vector<double>(64, 1.0));
  REQUIRE(std::vector<double>(divisors.begin() + 64, divisors.end()) == std::vector<double>(192, 1e30));
  for (const int64_t head_dim : {2, 6, 16, 24, 96, 512}) {
    for (int64_t turning = 0; turning <= head_dim / 2; ++turning) {
      std::vector<float> file(static_cast<std::size_t>(head_dim / 2), 1e30F);
      std::fill_n(file.begin(), turning, 1.0F);
      const auto back = rope_of_divisors(file, 1e6);
      INFO(head_dim << " " << turning);
      REQUIRE(back.has_value());
      const std::vector<double> again = rope_divisors(*back, head_dim);
      REQUIRE(std::equal(file.begin(), file.end(), again.begin(),
                         [](float one, double two) { return one == static_cast<float>(two); }));
    }
  }
  REQUIRE_FALSE(rope_of_divisors({1.0F, 1e30F, 1.0F, 1e30F}, 1e6).has_value());
}

TEST_CASE("names of models with more than text lead to the same tensors") {
  for (const char* name :
       {"model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight",
        "language_model.model.layers.3.mlp.up_proj.weight"}) {
    REQUIRE(hf_to_gguf(gemma4(), name)->name == "blk.3.ffn_up.weight");
    REQUIRE(hf_to_gguf(gemma3(), name)->name == "blk.3.ffn_up.weight");
  }
  REQUIRE(canonical_name(gemma3(), "language_model.lm_head.weight") == "lm_head.weight");
  REQUIRE(matches_any(gemma3().hf_only, canonical_name(gemma3(), "vision_tower.vision_model.head.weight")));
  REQUIRE(matches_any(gemma4().hf_only, "model.audio_tower.layers.0.conv.weight"));
  REQUIRE_FALSE(hf_to_gguf(gemma4(), "model.vision_tower.layers.0.mlp.up_proj.weight").has_value());
  REQUIRE_FALSE(hf_to_gguf(find_by_model_type("llama"), "model.language_model.layers.3.mlp.up_proj.weight")
                    .has_value());
}

TEST_CASE("Gemma 4: names without .weight, and what is stored as float32") {
  const auto rule = [](const char* hf) { return *hf_to_gguf(gemma4(), hf); };
  REQUIRE(rule("model.layers.2.layer_scalar").name == "blk.2.layer_output_scale.weight");
  REQUIRE(rule("model.layers.2.router.scale").name == "blk.2.ffn_gate_inp.scale");
  REQUIRE(rule("model.layers.2.router.per_expert_scale").name == "blk.2.ffn_down_exps.scale");
  REQUIRE(rule("model.layers.2.experts.gate_up_proj").name == "blk.2.ffn_gate_up_exps.weight");
  REQUIRE(rule("model.layers.2.experts.gate_up_proj").rule->kind == TensorKind::kMatrix);
  REQUIRE(rule("model.layers.2.router.proj.weight").rule->kind == TensorKind::kRouter);
  REQUIRE(rule("model.embed_tokens_per_layer.weight").rule->kind == TensorKind::kLayerEmbedding);
  REQUIRE(rule("model.layers.2.post_attention_layernorm.weight").name == "blk.2.post_attention_norm.weight");
}
