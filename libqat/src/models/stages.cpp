#include "stages.hpp"

#include <ATen/TensorOperators.h>

#include <string>

namespace qat::models {
namespace {

using State = std::vector<at::Tensor>;
using Names = std::vector<std::string>;

/// Value row of the input i of o_proj: head j of H reads key-value head j * K / H.
std::vector<int64_t> value_rows(int64_t heads, const LayerConfig& layer) {
  const int64_t repeat = heads / layer.num_key_value_heads;
  std::vector<int64_t> rows;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t d = 0; d < layer.head_dim; ++d) rows.push_back(head / repeat * layer.head_dim + d);
  }
  return rows;
}

/// What a stage knows when it begins: the residual stream, what its pass keeps for later layers, and the
/// input of the next products. Between the experts' stages also what both branches need to be joined.
struct Progress {
  at::Tensor x;
  ForwardPass pass;
  at::Tensor input;
  State branches = {};
};

/// The state between stages: the residual stream, the inputs of layers that have not used them yet, keys and
/// values by layer, the branches, and at last the input of the next products.
State pack(const Progress& progress, const at::Tensor& input) {
  State state{progress.x};
  state.insert(state.end(), progress.pass.layer_inputs.begin(), progress.pass.layer_inputs.end());
  for (const auto& [layer, read] : progress.pass.all_kept) {
    state.push_back(read.keys);
    state.push_back(read.values);
  }
  state.insert(state.end(), progress.branches.begin(), progress.branches.end());
  state.push_back(input);
  return state;
}

/// The way back, for any stage behind the inputs of layers. branches: how many tensors they take.
Progress unpack(const State& state, const Trunk& trunk, const DecoderConfig& config, int64_t branches) {
  const auto end = state.end() - 1 - branches;
  Progress progress{state.front(), trunk->begin(state.front()), state.back(), {end, state.end() - 1}};
  auto next = state.begin() + 1;
  if (trunk->has_layer_inputs()) {
    progress.pass.layer_inputs.assign(next, next + config.num_hidden_layers);
    next += config.num_hidden_layers;
  }
  for (int64_t layer = 0; next != end; ++layer) {
    if (!has_readers(config, layer)) continue;
    progress.pass.all_kept[layer] = {next[0], next[1]};
    next += 2;
  }
  return progress;
}

using Enter = std::function<Progress(const State&)>;

/// The stages of one layer. The first one gets what `enter` makes a residual stream of.
class LayerStages {
 public:
  LayerStages(Trunk trunk, const DecoderConfig& config, int64_t index)
      : trunk_(std::move(trunk)),
        config_(config),
        index_(static_cast<size_t>(index)),
        shape_(config.layer(index)),
        makes_keys_(shape_.kv_source == index),
        shares_keys_(has_readers(config, index)),
        layer_(trunk_->layers[index_]),
        prefix_("model.layers." + std::to_string(index) + ".") {}

  Stage attention(const Enter& enter) const {
    const auto run = [layer = layer_, enter](const State& state) -> State {
      const Progress now = enter(state);
      Block block = layer;
      return pack(now, block->attention_input(now.x, now.pass));
    };
    Names weights = {"self_attn.q_proj.weight"};
    if (makes_keys_) weights.emplace_back("self_attn.k_proj.weight");
    if (makes_keys_ && shape_.has_value) weights.emplace_back("self_attn.v_proj.weight");
    return {run, named(weights), gain("input_layernorm.weight"), {}};
  }

  Stage attention_output() const {
    const auto run = [enter = resume(), layer = layer_](const State& state) -> State {
      Progress now = enter(state);
      Block block = layer;
      const at::Tensor mixed = block->self_attn->mixed(now.input, now.pass);
      return pack(now, mixed);
    };
    // A norm on values takes their scale away, and values that other layers read too are not this one's.
    const bool produced = makes_keys_ && shape_.has_value && !config_.v_norm && !shares_keys_;
    Names producers;
    if (produced) producers.emplace_back("self_attn.v_proj.weight");
    if (produced && config_.attention_bias) producers.emplace_back("self_attn.v_proj.bias");
    return {run, named({"self_attn.o_proj.weight"}), named(producers),
            produced ? value_rows(config_.num_attention_heads, shape_) : std::vector<int64_t>()};
  }

  Stage feed_forward() const {
    const auto run = [enter = resume(), layer = layer_](const State& state) -> State {
      Progress now = enter(state);
      Block block = layer;
      now.x = block->add_attention(now.x, now.input);
      return pack(now, block->feed_forward_input(now.x, now.pass));
    };
    return {
        run,
        named({"mlp.gate_proj.weight", "mlp.up_proj.weight"}),
        gain(config_.branch_norms ? "pre_feedforward_layernorm.weight" : "post_attention_layernorm.weight"),
        {}};
  }

  Stage feed_forward_output() const {
    const auto run = [enter = resume(), layer = layer_](const State& state) -> State {
      const Progress now = enter(state);
      Block block = layer;
      return pack(now, block->mlp->gated(now.input));
    };
    Names producers = {"mlp.up_proj.weight"};
    if (config_.mlp_bias) producers.emplace_back("mlp.up_proj.bias");
    return {run, named({"mlp.down_proj.weight"}), named(producers), {}};
  }

  /// The experts beside the dense branch, in a model that has them.
  Stage expert_gate_up() const {
    const auto run = [enter = resume(), layer = layer_](const State& state) -> State {
      Progress now = enter(state);
      Block block = layer;
      const RoutedTokens tokens = block->experts()->route(now.x, now.pass.compute());
      now.branches = {block->mlp->output(now.input), tokens.places, tokens.weights, tokens.counts};
      return pack(now, tokens.rows);
    };
    return {run, named({"experts.gate_up_proj"}), {}, {}, false, config_.experts.count};
  }

  Stage expert_down() const {
    const auto run = [enter = resume(kBranches), layer = layer_](const State& state) -> State {
      const Progress now = enter(state);
      Block block = layer;
      return pack(now, block->experts()->gated(routed(now)));
    };
    return {run, named({"experts.down_proj"}), {}, {}, false, config_.experts.count};
  }

  /// Behind the feed-forward layer, in a model with inputs per layer.
  Stage layer_input_gate() const {
    const auto run = [enter = behind_feed_forward()](const State& state) -> State {
      const Progress now = enter(state);
      return pack(now, now.x.to(now.pass.compute()));
    };
    return {run, named({"per_layer_input_gate.weight"}), {}, {}};
  }

  Stage layer_input_projection() const {
    const auto run = [enter = resume(), layer = layer_, index = index_](const State& state) -> State {
      Progress now = enter(state);
      Block block = layer;
      const at::Tensor gated = block->gated_layer_input(now.x, now.pass);
      now.pass.layer_inputs[index].reset();  // of all layers they are the largest part of the state
      return pack(now, gated);
    };
    return {run, named({"per_layer_projection.weight"}), {}, {}};
  }

  /// The residual stream behind the layer, from the state of its last stage.
  Enter leave() const {
    const bool has_input = trunk_->has_layer_inputs();
    return [enter = has_input ? resume() : behind_feed_forward(), layer = layer_,
            has_input](const State& state) {
      Progress now = enter(state);
      Block block = layer;
      if (has_input) now.x = block->add_layer_input(now.x, now.input);
      now.x = block->leave(now.x);
      return now;
    };
  }

 private:
  /// Tensors of the branches: see `expert_gate_up`.
  static constexpr int64_t kBranches = 4;

  static RoutedTokens routed(const Progress& now) {
    return {now.input, now.branches[3], now.branches[1], now.branches[2]};
  }

  Enter resume(int64_t branches = 0) const {
    return [trunk = trunk_, config = config_, branches](const State& state) {
      return unpack(state, trunk, config, branches);
    };
  }

  /// The residual stream behind the feed-forward layer, from the state of its last stage.
  Enter behind_feed_forward() const {
    const bool experts = config_.experts.count > 0;
    return [enter = resume(experts ? kBranches : 0), layer = layer_, experts](const State& state) {
      Progress now = enter(state);
      Block block = layer;
      now.x = experts
                  ? block->add_branch(now.x, block->experts()->join(routed(now), now.input, now.branches[0]))
                  : block->add_feed_forward(now.x, now.input, now.pass);
      now.branches.clear();
      return now;
    };
  }

  Names named(Names names) const {
    for (std::string& name : names) name.insert(0, prefix_);
    return names;
  }

  /// A norm's weight as a producer: it is one only where it is the gain itself.
  Names gain(const char* name) const { return config_.norm_offset == 0.0 ? named({name}) : Names(); }

  Trunk trunk_;
  DecoderConfig config_;
  size_t index_;
  LayerConfig shape_;
  bool makes_keys_, shares_keys_;
  Block layer_;
  std::string prefix_;
};

/// tokens -> the residual stream in front of the first layer.
Enter embedding(const Trunk& trunk) {
  return [trunk](const State& state) -> Progress {
    Trunk model = trunk;
    return {model->embed(state.at(0)), model->begin(state.at(0)), {}};
  };
}

/// Of a model with inputs per layer: the stage in front of all layers, and what makes their inputs of its
/// state.
Stage layer_inputs(const Trunk& trunk) {
  const auto run = [trunk](const State& state) -> State {
    Trunk model = trunk;
    const at::Tensor x = model->embed(state.at(0));
    const ForwardPass pass = model->begin(state.at(0));
    return {x, model->token_inputs(state.at(0)), model->layer_inputs_input(x, pass)};
  };
  return {run, {"model.per_layer_model_projection.weight"}, {}, {}};
}

Enter behind_layer_inputs(const Trunk& trunk) {
  return [trunk](const State& state) {
    Trunk model = trunk;
    Progress now{state.at(0), model->begin(state.at(0)), {}};
    now.pass.layer_inputs = model->layer_inputs(state.at(2), state.at(1));
    return now;
  };
}

}  // namespace

std::vector<Stage> make_stages(const Trunk& trunk, const DecoderConfig& config) {
  std::vector<Stage> stages;
  Enter enter = embedding(trunk);
  if (trunk->has_layer_inputs()) {
    stages.push_back(layer_inputs(trunk));
    enter = behind_layer_inputs(trunk);
  }
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const LayerStages layer(trunk, config, i);
    stages.push_back(layer.attention(enter));
    stages.push_back(layer.attention_output());
    stages.push_back(layer.feed_forward());
    stages.push_back(layer.feed_forward_output());
    if (config.experts.count > 0) {
      stages.push_back(layer.expert_gate_up());
      stages.push_back(layer.expert_down());
    }
    if (trunk->has_layer_inputs()) {
      stages.push_back(layer.layer_input_gate());
      stages.push_back(layer.layer_input_projection());
    }
    enter = layer.leave();
  }
  const auto finish = [trunk, enter](const State& state) -> State {
    const Progress now = enter(state);
    Trunk model = trunk;
    return {model->norm(now.x, now.pass.compute())};
  };
  if (config.tie_word_embeddings) {
    // No producer: what the head's columns are multiplied with, the embedding's would be, too.
    stages.push_back({finish, {"model.embed_tokens.weight"}, {}, {}, /*tied=*/true});
  } else {
    const bool is_gain = config.norm_offset == 0.0;
    stages.push_back({finish, {"lm_head.weight"}, is_gain ? Names{"model.norm.weight"} : Names(), {}});
  }
  return stages;
}

}  // namespace qat::models
