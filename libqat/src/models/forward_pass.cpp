#include "forward_pass.hpp"

namespace qat::models {

ForwardPass::ForwardPass(const DecoderConfig& config, int64_t tokens, at::Device device,
                         at::ScalarType compute, KvCache* cache)
    : config_(config),
      tokens_(tokens),
      start_(cache == nullptr ? 0 : cache->length()),
      device_(device),
      compute_(compute),
      cache_(cache) {}

RopeTable ForwardPass::rope(const LayerConfig& layer) {
  for (const auto& [like, table] : ropes_) {
    if (like.head_dim == layer.head_dim && like.rope == layer.rope) return table;
  }
  ropes_.emplace_back(layer, make_rope(start_, tokens_, layer.head_dim, layer.rope, device_));
  return ropes_.back().second;
}

KeysValues ForwardPass::add(int64_t layer, KeysValues made) {
  KeysValues all = std::move(made);
  if (cache_ != nullptr) {
    KvCache::Entry& entry = cache_->entry(layer);
    all = {cache_->extended(entry.window, entry.keys, all.keys),
           cache_->extended(entry.window, entry.values, all.values)};
  }
  if (has_readers(config_, layer)) all_kept[layer] = all;
  return all;
}

bool has_readers(const DecoderConfig& config, int64_t layer) {
  for (int64_t i = layer + 1; i < static_cast<int64_t>(config.layers.size()); ++i) {
    if (config.layers[static_cast<size_t>(i)].kv_source == layer) return true;
  }
  return false;
}

}  // namespace qat::models
