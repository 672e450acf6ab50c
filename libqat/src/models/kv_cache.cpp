#include "qat/models/kv_cache.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace qat::models {
namespace {

constexpr int64_t kPositions = 2;  // the dimension S

/// `held` with room for `positions`; at least twice as much as before, so that growing costs little per
/// token.
at::Tensor with_room(const at::Tensor& held, const at::Tensor& like, int64_t used, int64_t positions) {
  if (held.defined() && held.size(kPositions) >= positions) return held;
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes[kPositions] = held.defined() ? std::max(positions, 2 * held.size(kPositions)) : positions;
  at::Tensor larger = at::empty(sizes, like.options());
  if (used > 0) larger.narrow(kPositions, 0, used).copy_(held.narrow(kPositions, 0, used));
  return larger;
}

}  // namespace

KvCache::KvCache(const DecoderConfig& config) {
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) entries_.push_back({config.layer(i).window, {}, {}});
}

void KvCache::clear() {
  for (Entry& entry : entries_) entry.keys = entry.values = {};
  length_ = batch_ = 0;
}

int64_t KvCache::bytes() const {
  int64_t sum = 0;
  for (const Entry& entry : entries_) {
    for (const at::Tensor& tensor : {entry.keys.held, entry.values.held}) {
      if (tensor.defined()) sum += static_cast<int64_t>(tensor.nbytes());
    }
  }
  return sum;
}

at::Tensor KvCache::extended(int64_t window, Positions& positions, const at::Tensor& made) const {
  at::Tensor& held = positions.held;
  if (window > 0) {
    // Of the positions before, each new query reads window - 1.
    const int64_t before = std::min(length_, window - 1);
    return positions.pending = before == 0 ? made : at::cat({held, made}, kPositions);
  }
  held = with_room(held, made, length_, length_ + made.size(kPositions));
  held.narrow(kPositions, length_, made.size(kPositions)).copy_(made);
  return held.narrow(kPositions, 0, length_ + made.size(kPositions));
}

void KvCache::commit(int64_t batch, int64_t tokens) {
  batch_ = batch;
  length_ += tokens;
  for (Entry& entry : entries_) {
    for (Positions* positions : {&entry.keys, &entry.values}) {
      if (!positions->pending.defined()) continue;
      const int64_t size = positions->pending.size(kPositions), kept = std::min(size, entry.window - 1);
      positions->held = positions->pending.narrow(kPositions, size - kept, kept).contiguous();
      positions->pending.reset();
    }
  }
}

}  // namespace qat::models
