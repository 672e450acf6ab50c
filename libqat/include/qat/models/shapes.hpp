#pragma once

// A decoder's tensors without their numbers: for questions of size about models of any size.

#include <memory>
#include <string>
#include <vector>

#include "qat/core/scheme.hpp"
#include "qat/models/decoder.hpp"

namespace qat::models {

/// A parameter or buffer.
struct TensorShape {
  std::string name;  ///< as in the decoder's state
  std::vector<int64_t> shape;
  SlotKind kind = SlotKind::kOther;  ///< of the layer whose weight it is; norms, biases and scales are kOther
  bool buffer = false;               ///< part of the state, not trained
};

/// A decoder whose weights have shapes and no memory (device "meta"); made in milliseconds. Slots and
/// policies see the model that it stands for; it cannot compute.
std::shared_ptr<Decoder> decoder_without_memory(const DecoderConfig& config);

/// Its parameters, then its buffers, in the model's order. All are float32 in training.
std::vector<TensorShape> parameter_shapes(const DecoderConfig& config);

}  // namespace qat::models
