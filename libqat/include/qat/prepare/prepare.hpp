#pragma once

// Attaching a policy to a model. A slot is one quantizable weight; `prepare` finds the slots of a module,
// asks the policy for a scheme each, and binds quantizers. The parameters themselves are the latents and stay
// what they are: optimizers, `named_parameters()` and gradients go on as before.

#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/policy/policy.hpp"
#include "qat/prepare/report.hpp"
#include "qat/quantizer/quantizer.hpp"

namespace qat {

/// One quantizable weight of a model. The functions borrow the module: they are valid as long as it lives.
struct Slot {
  std::string name;  ///< parameter name in the module: "conv1.weight"
  SlotKind kind = SlotKind::kOther;
  std::function<at::Tensor()> get;      ///< the latent, float32[R, ...]
  std::function<void(at::Tensor)> set;  ///< puts a tensor where forward reads it (torch::nn layers)
  /// Layers that call the operators themselves (qat::nn) take the quantizer instead of `set`; null unbinds.
  std::function<void(std::shared_ptr<Quantizer>)> bind;
  std::vector<std::string> aliases = {};  ///< further names of the same tensor (tied weights)
  /// Weights in a row of the matrix that the grid sees; 0: everything after dimension 0. Stacks of matrices
  /// [E, O, I] have rows of I.
  int64_t row = 0;
};

/// Puts quantized weights in place for its lifetime (torch::nn layers), and the latents back afterwards, also
/// when an exception passes. ArgumentError when another scope already holds one of the slots.
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

/// A module with a policy attached: its slots, and a quantizer for each that the policy puts on a grid.
class PreparedModel {
 public:
  /// `slots`: from `find_slots` or the user's own. Errors: see `prepare`.
  PreparedModel(std::shared_ptr<torch::nn::Module> module, std::vector<Slot> slots, const Policy& policy);

  /// While the returned scope lives, forward sees w_hat and gradients reach the latents.
  ///   { auto scope = model.quantized(); loss = f(net->forward(x)); }  loss.backward();
  /// Needed for torch::nn layers; harmless for models made of qat::nn layers alone. NumericError for a latent
  /// that its grid cannot hold.
  [[nodiscard]] QuantizedScope quantized();

  torch::nn::Module& module() noexcept { return *module_; }
  const torch::nn::Module& module() const noexcept { return *module_; }
  const std::vector<Slot>& slots() const noexcept { return slots_; }
  /// Parallel to slots(); null where the policy leaves the tensor float.
  const std::vector<std::shared_ptr<Quantizer>>& quantizers() const noexcept { return quantizers_; }
  const Policy& policy() const noexcept { return policy_; }

  /// All quantizers on (training, QAT score) or off (the float latents).
  void set_enabled(bool enabled);
  /// The learned scales, in model order, each named "<weight's key>_scales", then those of activations, named
  /// as in checkpoints. They are no parameters of the module: an optimizer takes them beside
  /// `module().parameters()`.
  std::vector<NamedTensor> scale_parameters() const;
  /// What rounds activations, in model order: inputs and outputs of layers, then keys and values.
  const std::vector<std::shared_ptr<ActivationQuantizer>>& activations() const noexcept {
    return activations_;
  }
  /// While on, every forward pass widens the static activation scales to its activations, also without
  /// gradients: to calibrate without training. Training calibrates by itself, see Policy::activation_scales.
  void set_calibrating(bool calibrating);
  /// Sets all learned scales anew from the present latents, as `prepare` did: after other weights were
  /// loaded. See Quantizer::initialize_scales.
  void initialize_scales(ScaleRule from = ScaleRule::kSearch);
  /// Per tensor, in model order; parameters outside every slot are listed as floats, tied ones once.
  /// ArgumentError while a QuantizedScope is alive.
  std::vector<TensorReport> report() const;
  /// Adds the static activation scales as a checkpoint holds them, float32[] each, layers that share
  /// another's keys and values included.
  void add_activation_scales(std::vector<Latent>& tensors) const;

 private:
  void bind_kv_cache();

  std::shared_ptr<torch::nn::Module> module_;
  std::vector<Slot> slots_;
  std::vector<std::shared_ptr<Quantizer>> quantizers_;
  std::vector<std::shared_ptr<ActivationQuantizer>> activations_;
  /// Further names of a scale: of layers that share the keys and values of another.
  std::vector<std::pair<std::string, std::shared_ptr<ActivationQuantizer>>> shared_;
  Policy policy_;
};

/// Slots of torch::nn::Linear, Embedding, Conv1d/2d/3d, ConvTranspose1d/2d/3d and of qat::nn layers, by
/// module traversal. Stacks of experts are one slot each, of kind linear. A row is everything after dimension
/// 0: an output channel, except in ConvTranspose, whose weight is [in, out / groups, ...] and whose rows are
/// therefore input channels. Tied weights are one slot: the first name counts, the others are its aliases.
/// After `head->weight = embed->weight` LibTorch's registry still holds the head's old tensor, which no
/// forward reads: that registration is removed, so that `parameters()` lists each trained tensor once.
/// ArgumentError for a member that is neither its registered parameter nor tied to another one.
std::vector<Slot> find_slots(torch::nn::Module& module);

/// `extra`: slots of the user's own layers. ArgumentError for quantized latents that are not float32, for a
/// member that no longer is its registered parameter, for slots that lack `get` or both of `set` and `bind`,
/// for a name given twice, and for every policy error; UnsupportedError for an Embedding with max_norm, for
/// activations of layers that do not call their quantizer (torch::nn) and of stacks, and for a KV cache of a
/// module that has no nn::HasKvSlots.
PreparedModel prepare(std::shared_ptr<torch::nn::Module> module, const Policy& policy,
                      std::vector<Slot> extra = {});

/// The numbers an evaluation forward computes from the present latents. Buffers and unquantized parameters
/// are kept as they are; tied names become aliases. `config` and `tokenizer`: see QuantizedCheckpoint.
/// ArgumentError while a QuantizedScope is alive.
QuantizedCheckpoint freeze(const PreparedModel& model, std::string config = "", std::string tokenizer = "");

}  // namespace qat
