#pragma once

// Keys and values of the tokens that a decoder has seen, for decoding one token after the other.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "qat/models/config.hpp"

namespace qat::models {

/// Keys and values of every layer that makes its own. Layers with a window keep no more than it reaches.
/// Legend: B batch, K key-value heads, S positions, D head dimension.
class KvCache {
 public:
  explicit KvCache(const DecoderConfig& config);

  /// Tokens of each sequence that passed so far.
  int64_t length() const noexcept { return length_; }
  /// B, or 0 before the first tokens.
  int64_t batch() const noexcept { return batch_; }
  /// Forgets all tokens.
  void clear();
  /// Bytes of the tensors held.
  int64_t bytes() const;

 private:
  friend class Decoder;
  friend class ForwardPass;

  /// One tensor of a layer, [B, K, S, D].
  struct Positions {
    at::Tensor held;     ///< without a window with room for more positions
    at::Tensor pending;  ///< with a window: what `commit` takes the next `held` from
  };
  struct Entry {
    int64_t window = 0;
    Positions keys, values;
  };

  /// Positions `length()` ... of a layer, [B, K, T, D] -> all that their queries may read, [B, K, S, D].
  at::Tensor extended(int64_t window, Positions& positions, const at::Tensor& made) const;
  Entry& entry(int64_t layer) { return entries_[static_cast<size_t>(layer)]; }
  /// `tokens` more positions have passed through all layers.
  void commit(int64_t batch, int64_t tokens);

  std::vector<Entry> entries_;
  int64_t length_ = 0, batch_ = 0;
};

}  // namespace qat::models
