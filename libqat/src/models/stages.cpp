#include "stages.hpp"

#include <ATen/TensorOperators.h>

#include <string>

namespace qat::models {
namespace {

using State = std::vector<at::Tensor>;
using Names = std::vector<std::string>;

/// Value row of the input i of o_proj: head j of H reads key-value head j * K / H.
std::vector<int64_t> value_rows(const DecoderConfig& config) {
  const int64_t repeat = config.num_attention_heads / config.num_key_value_heads;
  std::vector<int64_t> rows;
  for (int64_t head = 0; head < config.num_attention_heads; ++head) {
    for (int64_t d = 0; d < config.head_dim; ++d) rows.push_back(head / repeat * config.head_dim + d);
  }
  return rows;
}

/// The four stages of one layer. The state between them is the residual stream and the input of the next
/// products; the first stage gets what `enter` makes a residual stream of.
class LayerStages {
 public:
  LayerStages(Trunk trunk, const DecoderConfig& config, int64_t index)
      : trunk_(std::move(trunk)),
        config_(config),
        layer_(trunk_->layers[index]),
        prefix_("model.layers." + std::to_string(index) + ".") {}

  Stage attention(std::function<at::Tensor(const State&)> enter) const {
    const auto run = [trunk = trunk_, layer = layer_, enter](const State& state) -> State {
      const at::Tensor x = enter(state);
      Block block = layer;
      return {x, block->input_layernorm(x, trunk->compute_dtype())};
    };
    return {run,
            named({"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}),
            named({"input_layernorm.weight"}),
            {}};
  }

  Stage attention_output() const {
    const auto run = [layer = layer_, config = config_](const State& state) -> State {
      const at::Tensor& h = state[1];
      const RopeTable rope = make_rope(h.size(1), config.head_dim, config.rope, h.device());
      Block block = layer;
      return {state[0], block->self_attn->mixed(h, rope)};
    };
    Names producers = {"self_attn.v_proj.weight"};
    if (config_.attention_bias) producers.emplace_back("self_attn.v_proj.bias");
    return {run, named({"self_attn.o_proj.weight"}), named(producers), value_rows(config_)};
  }

  Stage feed_forward() const {
    const auto run = [trunk = trunk_, layer = layer_](const State& state) -> State {
      Block block = layer;
      const at::Tensor x = state[0] + block->self_attn->output(state[1]);
      return {x, block->post_attention_layernorm(x, trunk->compute_dtype())};
    };
    return {run,
            named({"mlp.gate_proj.weight", "mlp.up_proj.weight"}),
            named({"post_attention_layernorm.weight"}),
            {}};
  }

  Stage feed_forward_output() const {
    const auto run = [layer = layer_](const State& state) -> State {
      Block block = layer;
      return {state[0], block->mlp->gated(state[1])};
    };
    Names producers = {"mlp.up_proj.weight"};
    if (config_.mlp_bias) producers.emplace_back("mlp.up_proj.bias");
    return {run, named({"mlp.down_proj.weight"}), named(producers), {}};
  }

  /// The residual stream behind the layer, from the state of its last stage.
  std::function<at::Tensor(const State&)> leave() const {
    return [layer = layer_](const State& state) {
      Block block = layer;
      return state[0] + block->mlp->output(state[1]);
    };
  }

 private:
  Names named(Names names) const {
    for (std::string& name : names) name.insert(0, prefix_);
    return names;
  }

  Trunk trunk_;
  DecoderConfig config_;
  Block layer_;
  std::string prefix_;
};

}  // namespace

std::vector<Stage> make_stages(const Trunk& trunk, const DecoderConfig& config) {
  std::vector<Stage> stages;
  std::function<at::Tensor(const State&)> enter = [trunk](const State& state) {
    Trunk model = trunk;
    return model->embed(state.at(0));
  };
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const LayerStages layer(trunk, config, i);
    stages.push_back(layer.attention(enter));
    stages.push_back(layer.attention_output());
    stages.push_back(layer.feed_forward());
    stages.push_back(layer.feed_forward_output());
    enter = layer.leave();
  }
  const auto finish = [trunk, enter](const State& state) -> State {
    Trunk model = trunk;
    return {model->norm(enter(state), model->compute_dtype())};
  };
  if (config.tie_word_embeddings) {
    // No producer: what the head's columns are multiplied with, the embedding's would be, too.
    stages.push_back({finish, {"model.embed_tokens.weight"}, {}, {}, /*tied=*/true});
  } else {
    stages.push_back({finish, {"lm_head.weight"}, {"model.norm.weight"}, {}});
  }
  return stages;
}

}  // namespace qat::models
