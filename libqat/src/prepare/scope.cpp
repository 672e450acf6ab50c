// QuantizedScope: w_hat in the layers' members for a while. The graph of the forward pass keeps w_hat alive
// as long as backward needs it; the members hold the latents again before anything else can look at them.

#include <mutex>
#include <unordered_set>

#include "prepare/slots.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

/// The latents, and the tensors in their place, of every living scope: the same model must not enter twice,
/// whether through one PreparedModel or two.
class Held {
 public:
  /// False when the tensor is already held.
  bool insert(const at::Tensor& tensor) {
    const std::lock_guard lock(mutex_);
    return tensors_.insert(tensor.unsafeGetTensorImpl()).second;
  }
  void erase(const at::Tensor& tensor) noexcept {
    const std::lock_guard lock(mutex_);
    tensors_.erase(tensor.unsafeGetTensorImpl());
  }
  bool contains(const at::Tensor& tensor) {
    const std::lock_guard lock(mutex_);
    return tensors_.contains(tensor.unsafeGetTensorImpl());
  }

 private:
  std::mutex mutex_;
  std::unordered_set<const void*> tensors_;
};

Held& held() {
  static Held instance;
  return instance;
}

}  // namespace

void detail::expect_no_scope(const char* function, const Slot& slot) {
  if (!held().contains(slot.get())) return;
  throw ArgumentError(std::string(function) + ": " + slot.name +
                      ": expected the latent in place, got a QuantizedScope that still holds it");
}

/// What to undo, in reverse. Its destructor runs also when the scope's constructor throws half way.
struct QuantizedScope::Saved {
  struct Entry {
    const Slot* slot;
    at::Tensor latent;
    at::Tensor replacement;  // undefined where the layer calls the operators itself
  };
  std::vector<Entry> entries;

  Saved() = default;
  Saved(const Saved&) = delete;
  Saved& operator=(const Saved&) = delete;

  ~Saved() {
    for (auto entry = entries.rbegin(); entry != entries.rend(); ++entry) {
      held().erase(entry->latent);
      if (!entry->replacement.defined()) continue;
      held().erase(entry->replacement);
      try {
        entry->slot->set(entry->latent);
      } catch (...) {
        // A user's `set` that took w_hat but not the latent: the other layers still get theirs back.
      }
    }
  }

  void enter(const Slot& slot, const Quantizer& quantizer) {
    detail::expect_no_scope("QuantizedScope", slot);
    at::Tensor latent = slot.get();
    held().insert(latent);
    entries.push_back({&slot, latent, {}});
    if (!slot.set || !quantizer.enabled()) return;
    at::Tensor quantized = quantizer.fake_quantize(latent);
    held().insert(quantized);
    entries.back().replacement = quantized;
    slot.set(quantized);
  }
};

QuantizedScope::QuantizedScope(std::vector<Slot>& slots,
                               const std::vector<std::shared_ptr<Quantizer>>& quantizers)
    : saved_(std::make_unique<Saved>()) {
  if (slots.size() != quantizers.size()) {
    throw ArgumentError("QuantizedScope: quantizers: expected one for each of " +
                        std::to_string(slots.size()) + " slots, got " + std::to_string(quantizers.size()));
  }
  saved_->entries.reserve(slots.size());
  for (size_t i = 0; i < slots.size(); ++i) {
    if (quantizers[i]) saved_->enter(slots[i], *quantizers[i]);
  }
}

QuantizedScope::~QuantizedScope() = default;

}  // namespace qat
