#include "qat/ptq/sensitivity.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/multinomial.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <unordered_set>
#include <utility>
#include <vector>

#include "ptq/check.hpp"
#include "ptq/stage_walk.hpp"
#include "qat/core/error.hpp"

namespace qat::ptq {
namespace {

constexpr const char* kName = "token_sensitivity";
/// In means: a hundredth of the tokens would carry up to a third of the sum, and the result fit them alone.
constexpr double kMostWeight = 8.0;

/// For its lifetime, gradients flow through the model but into no quantized weight.
class ThroughScope {
 public:
  explicit ThroughScope(PreparedModel& model) {
    std::unordered_set<const void*> weights;
    for (size_t i = 0; i < model.slots().size(); ++i) {
      if (model.quantizers()[i]) weights.insert(model.slots()[i].get().unsafeGetTensorImpl());
    }
    for (const auto& parameter : model.module().named_parameters()) {
      const at::Tensor& value = parameter.value();
      if (!value.is_floating_point()) continue;
      before_.emplace_back(value, value.requires_grad());
      value.set_requires_grad(!weights.contains(value.unsafeGetTensorImpl()));
    }
  }
  ~ThroughScope() {
    for (auto& [value, required] : before_) {
      value.set_requires_grad(required);
      value.mutable_grad() = at::Tensor();
    }
  }
  ThroughScope(const ThroughScope&) = delete;
  ThroughScope& operator=(const ThroughScope&) = delete;

 private:
  std::vector<std::pair<at::Tensor, bool>> before_;
};

/// Writes the squared gradients of all layers' outputs into the rows of the batch under way.
class Recorder {
 public:
  Recorder(PreparedModel& model, at::IntArrayRef shape) : quantizers_(model.quantizers()) {
    for (const auto& quantizer : quantizers_) {
      if (!quantizer) continue;
      at::Tensor& sum = found_[quantizer->tensor()] = at::zeros(shape, at::kFloat);
      quantizer->set_output_hook([this, sum](const at::Tensor& output) {
        if (!output.requires_grad()) return;
        const at::Tensor rows = sum.narrow(0, first_, count_);
        output.register_hook([rows](const at::Tensor& gradient) {
          const at::Tensor g = gradient.detach().to(at::kFloat);
          rows.add_((g * g).mean(-1).view(rows.sizes()).cpu());
        });
      });
    }
  }
  ~Recorder() {
    for (const auto& quantizer : quantizers_) {
      if (quantizer) quantizer->set_output_hook(nullptr);
    }
  }
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  void begin(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
  }

  /// Weights that no gradient reached, such as embeddings, are left out.
  TokenWeights take() {
    TokenWeights weights;
    for (auto& [name, sum] : found_) {
      const double mean = sum.mean(at::kDouble).item<double>();
      if (!std::isfinite(mean)) {
        throw NumericError(std::string(kName) + ": " + name + ": expected finite gradients, got others");
      }
      if (mean <= 0) continue;
      const at::Tensor clipped = (sum / mean).clamp_max(kMostWeight);
      weights[name] = clipped / clipped.mean(at::kDouble).item<double>();
    }
    return weights;
  }

 private:
  const std::vector<std::shared_ptr<Quantizer>>& quantizers_;
  TokenWeights found_;
  int64_t first_ = 0, count_ = 0;
};

/// The summed cross-entropy with labels drawn from the model's own distribution.
at::Tensor own_loss(const at::Tensor& logits, at::Generator generator) {
  const at::Tensor rows = logits.reshape({-1, logits.size(-1)}).to(at::kFloat);
  const at::Tensor p = at::softmax(rows.detach(), -1).cpu();
  const at::Tensor labels = at::multinomial(p, 1, /*replacement=*/true, std::move(generator));
  return -at::log_softmax(rows, -1).gather(1, labels.to(rows.device())).sum();
}

}  // namespace

TokenWeights token_sensitivity(PreparedModel& model,
                               const std::function<at::Tensor(const at::Tensor& tokens)>& logits,
                               const at::Tensor& windows, int64_t seed, int64_t batch,
                               const Progress& progress) {
  if (windows.scalar_type() != at::kLong || windows.dim() != 2 || windows.numel() == 0) {
    fail({kName, "windows"}, "int64[n, T] of at least one token", describe(windows));
  }
  if (batch < 1) fail({kName, "batch"}, "at least 1", std::to_string(batch));
  const EnabledScope disabled(model, false);
  const ThroughScope through(model);
  Recorder recorder(model, windows.sizes());
  const at::Generator generator = at::detail::createCPUGenerator(static_cast<uint64_t>(seed));
  const c10::AutoGradMode with_gradients(true);
  int64_t first = 0;
  for (const at::Tensor& part : windows.split(batch)) {
    recorder.begin(first, part.size(0));
    const at::Tensor found = logits(part);
    if (!found.requires_grad()) {
      fail({kName, "logits"}, "logits that depend on a float parameter of the model", "constant ones");
    }
    own_loss(found, generator).backward();
    first += part.size(0);
    if (progress) progress(first, windows.size(0), "");
  }
  return recorder.take();
}

}  // namespace qat::ptq
