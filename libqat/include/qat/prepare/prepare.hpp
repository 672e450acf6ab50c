#pragma once

// Attaching a policy to a model. A slot is one quantizable weight; `prepare` finds the slots of a module,
// asks the policy for a scheme each, and binds quantizers. The parameters themselves are untouched: they are
// the latents.

#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/policy/policy.hpp"
#include "qat/quantizer/quantizer.hpp"

namespace qat {

/// One quantizable weight of a model.
struct Slot {
  std::string name;  ///< parameter name in the module: "conv1.weight"
  SlotKind kind = SlotKind::kOther;
  std::function<at::Tensor()> get;      ///< the latent, float32[R, ...]
  std::function<void(at::Tensor)> set;  ///< puts a tensor where forward reads it (torch::nn layers)
  /// Layers that call the operators themselves (qat::nn) take the quantizer instead of `set`.
  std::function<void(std::shared_ptr<Quantizer>)> bind;
};

/// One line of the report.
struct TensorReport {
  std::string name;
  SlotKind kind;
  std::vector<int64_t> shape;
  std::string grid;
  double bits_per_weight;  ///< scales included
  int64_t bytes;
  double relative_error;  ///< RMS(w_hat - w) / RMS(w); 0 for float tensors
};

/// Puts quantized weights in place for its lifetime (torch::nn layers), and the latents back afterwards.
class QuantizedScope {
 public:
  explicit QuantizedScope(std::vector<Slot>& slots,
                          const std::vector<std::shared_ptr<Quantizer>>& quantizers);
  ~QuantizedScope();
  QuantizedScope(const QuantizedScope&) = delete;
  QuantizedScope& operator=(const QuantizedScope&) = delete;

 private:
  struct Saved;
  std::unique_ptr<Saved> saved_;
};

class PreparedModel {
 public:
  PreparedModel(std::shared_ptr<torch::nn::Module> module, std::vector<Slot> slots, const Policy& policy);

  /// While the returned scope lives, forward sees w_hat and gradients reach the latents.
  ///   { auto scope = model.quantized(); loss = f(net->forward(x)); }  loss.backward();
  [[nodiscard]] QuantizedScope quantized();

  torch::nn::Module& module() noexcept { return *module_; }
  const std::vector<Slot>& slots() const noexcept { return slots_; }
  /// Parallel to slots(); null where the policy leaves the tensor float.
  const std::vector<std::shared_ptr<Quantizer>>& quantizers() const noexcept { return quantizers_; }
  const Policy& policy() const noexcept { return policy_; }

  /// All quantizers on (training, QAT score) or off (the float latents).
  void set_enabled(bool enabled);
  /// Per tensor, in model order; parameters outside every slot are listed as "f32".
  std::vector<TensorReport> report() const;

 private:
  std::shared_ptr<torch::nn::Module> module_;
  std::vector<Slot> slots_;
  std::vector<std::shared_ptr<Quantizer>> quantizers_;
  Policy policy_;
};

/// Slots of torch::nn::Linear, Embedding, Conv1d/2d/3d, ConvTranspose and of qat::nn layers, by module
/// traversal. Tied weights are one slot: the first name counts.
std::vector<Slot> find_slots(torch::nn::Module& module);

/// `extra`: slots of the user's own layers. ArgumentError for latents that are not float32, for a member that
/// no longer is its registered parameter, and for every policy error.
PreparedModel prepare(std::shared_ptr<torch::nn::Module> module, const Policy& policy,
                      std::vector<Slot> extra = {});

/// The report as an aligned text table with totals.
std::string to_string(const std::vector<TensorReport>& report);

/// The numbers an evaluation forward computes from the present latents. Buffers and unquantized parameters
/// are kept as floats; tied names become aliases. `config` and `tokenizer`: see QuantizedCheckpoint.
QuantizedCheckpoint freeze(const PreparedModel& model, std::string config = "", std::string tokenizer = "");

}  // namespace qat
