#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <vector>

#include "qat/quantizer/quantizer.hpp"

namespace qat::nn {

/// The linear layers in a stack of weights, for one forward pass: each is quantized when it is called, the
/// others cost nothing.
class LinearStack {
 public:
  /// weights: float32[E, O, I]; scales of the quantizer (which may be null): those of the rows of [E * O, I].
  LinearStack(const at::Tensor& weights, std::shared_ptr<Quantizer> quantizer);
  /// input: [..., I] -> [..., O] in its dtype, by layer i.
  at::Tensor linear(int64_t i, const at::Tensor& input) const;

 private:
  std::vector<at::Tensor> weights_, scales_;
  std::shared_ptr<Quantizer> quantizer_;
};

/// The weights of a mixture of experts, stacked as Hugging Face names and stores them: `gate_up_proj`, of
/// which the first f rows are the gate, and `down_proj`. A quantizer sees a stack as a matrix of the last
/// dimension's rows.
class ExpertsImpl : public torch::nn::Cloneable<ExpertsImpl> {
 public:
  ExpertsImpl(int64_t experts, int64_t hidden_size, int64_t intermediate_size);

  /// Draws each expert's weights as qat::nn::Linear does; but see WithoutInitialization.
  void reset() override;
  /// A deep copy; its quantizers are copies too.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  /// The layers of both stacks, as they are at the time of the call.
  LinearStack gate_up() const { return {gate_up_proj, gate_up_quantizer}; }
  /// See `gate_up`.
  LinearStack down() const { return {down_proj, down_quantizer}; }

  at::Tensor gate_up_proj;  ///< float32[E, 2f, h], the latent
  at::Tensor down_proj;     ///< float32[E, h, f], the latent
  std::shared_ptr<Quantizer> gate_up_quantizer, down_quantizer;

 private:
  int64_t experts_, hidden_size_, intermediate_size_;
};
TORCH_MODULE(Experts);

}  // namespace qat::nn
