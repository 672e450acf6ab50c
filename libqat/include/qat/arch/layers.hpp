#pragma once

// What each layer of a model is, where layers differ: windows, sizes of heads, keys that several layers
// share. Formulas: transformers `Gemma3TextConfig`, `Gemma4TextConfig`.

#include <cstdint>
#include <optional>
#include <vector>

#include "qat/arch/family.hpp"

namespace qat::arch {

/// One layer.
struct LayerShape {
  /// It attends to the last `sliding_window` positions (its own included), not to all.
  bool sliding = false;
  std::int64_t head_dim = 0;
  std::int64_t key_heads = 0;     ///< of keys and values
  std::int64_t feed_forward = 0;  ///< width of the dense feed-forward part
  /// The layer whose keys and values it attends to: itself, or the last one of its kind that has its own.
  std::int64_t key_source = 0;
  /// Values are the projected keys, before norm and rotary embedding: there is no v_proj.
  bool values_are_keys = false;

  bool operator==(const LayerShape&) const = default;
};

/// A model's layers, and the parts that only some models have.
struct ModelShape {
  std::vector<LayerShape> layers;
  std::int64_t sliding_window = 0;  ///< positions; 0: no layer has a window
  std::int64_t layer_inputs = 0;    ///< width of a layer's part of the embedding per layer; 0: there is none
  std::int64_t experts = 0;         ///< per layer; 0: the feed-forward part is dense
  std::int64_t experts_per_token = 0;
  std::int64_t expert_feed_forward = 0;

  /// Whether the layer has keys of its own.
  bool owns_keys(std::int64_t layer) const {
    return layers[static_cast<std::size_t>(layer)].key_source == layer;
  }
};

/// The same configuration as its family's table wants to read it: from `text_config` when there is one, and
/// with `Family::defaults` for what is absent. `lookup` is copied.
ConfigLookup decoder_lookup(const Family& family, ConfigLookup lookup);

/// Reads `layer_types` or `sliding_window_pattern`, `head_dim`, `num_key_value_heads`, `intermediate_size`;
/// for full layers `global_head_dim` and `num_global_key_value_heads`, or `per_layer_config` (as transformers
/// 5 writes it); `num_kv_shared_layers`, `use_double_wide_mlp`, `attention_k_eq_v`,
/// `hidden_size_per_layer_input`, and the experts' sizes when `enable_moe_block` is true. `lookup`: as
/// `decoder_lookup` makes it. ArgumentError naming the key for what is missing, of another type or out of
/// range; UnsupportedError naming it for other kinds of layers.
ModelShape read_shape(const Family& family, const ConfigLookup& lookup);

/// The n of which every n-th layer attends to all positions; 1 when all do, the number of layers and more
/// when none does, 0 when they follow another order.
std::int64_t full_every(const ModelShape& shape);

/// The size of a head in the layers that attend to all positions; in the others when there are none.
std::int64_t full_head_dim(const ModelShape& shape);

/// The square of what llama.cpp divides queries by; see `Implied::kAttentionScalar`.
std::int64_t attention_scalar(const ModelShape& shape, std::int64_t hidden_size, std::int64_t heads);

/// The rotary embedding of the layers that attend to all positions, and that of the others.
struct Ropes {
  Rope full;
  Rope sliding;
};

/// Both are the same in families that have one. Errors: those of `read_rope`.
Ropes read_ropes(const Family& family, const ConfigLookup& lookup);

/// What a model says of one of its family's tensors.
enum class Presence {
  kRequired,
  kOptional,
  kDead,    ///< files may carry it, nothing reads it
  kAbsent,  ///< such a model has no such tensor
};

/// `layer`: as in `Mapped`. kAbsent for a layer that the model does not have.
Presence presence(const TensorRule& rule, const ModelShape& shape, std::optional<std::int64_t> layer);

}  // namespace qat::arch
