#pragma once

// The keys and values that attention keeps, as what `prepare` can round.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "qat/quantizer/activation.hpp"

namespace qat::nn {

/// The keys and the values of one attention layer. The function borrows the module.
struct KvSlot {
  std::string name;                  ///< of the layer in its module: "model.layers.3.self_attn"
  std::vector<std::string> aliases;  ///< the layers that read these keys and values too
  /// Takes what rounds keys and values before they are kept; nulls unbind.
  std::function<void(std::shared_ptr<ActivationQuantizer> keys, std::shared_ptr<ActivationQuantizer> values)>
      bind;
};

/// A model that keeps keys and values.
class HasKvSlots {
 public:
  virtual ~HasKvSlots() = default;
  /// One for each layer that makes its own keys and values, in model order.
  virtual std::vector<KvSlot> kv_slots() = 0;
};

}  // namespace qat::nn
