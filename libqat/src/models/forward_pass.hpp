#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <utility>
#include <vector>

#include "qat/models/config.hpp"
#include "qat/models/kv_cache.hpp"
#include "rope.hpp"

namespace qat::models {

/// What attention reads, in rotated and normed form: [B, K, S, D] each, the last of S positions being the
/// last token of the pass.
struct KeysValues {
  at::Tensor keys, values;
};

/// What the layers share while some tokens pass through them.
class ForwardPass {
 public:
  /// Positions start at 0, or behind what `cache` holds. config and cache must outlive the pass.
  ForwardPass(const DecoderConfig& config, int64_t tokens, at::Device device, at::ScalarType compute,
              KvCache* cache = nullptr);

  /// The dtype in which matrix products run.
  at::ScalarType compute() const noexcept { return compute_; }
  /// The rotary angles of a layer, made once for layers that agree.
  RopeTable rope(const LayerConfig& layer);

  /// New keys and values of a layer -> all that its queries may read; kept if a later layer reads them too.
  KeysValues add(int64_t layer, KeysValues made);
  /// What `add` gave for that layer.
  const KeysValues& kept(int64_t layer) const { return all_kept.at(layer); }
  /// All that is kept for later layers, by layer. Stages of one pass hand it on.
  std::map<int64_t, KeysValues> all_kept;

  /// The inputs that layers have of their own, [B, T, p] in the compute dtype each, if the model has any.
  std::vector<at::Tensor> layer_inputs;

 private:
  const DecoderConfig& config_;
  int64_t tokens_, start_;
  at::Device device_;
  at::ScalarType compute_;
  KvCache* cache_;
  std::vector<std::pair<LayerConfig, RopeTable>> ropes_;
};

/// Whether a later layer reads the keys and values of `layer`.
bool has_readers(const DecoderConfig& config, int64_t layer);

}  // namespace qat::models
