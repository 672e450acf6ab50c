#include "qat/ptq/sensitivity.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <utility>
#include <vector>

#include "ptq/check.hpp"
#include "ptq/no_autocast.hpp"
#include "ptq/stage_walk.hpp"
#include "ptq/symmetric_sums.hpp"
#include "qat/core/error.hpp"
#include "qat/ops/sample.hpp"

namespace qat::ptq {
namespace {

constexpr const char* kName = "token_sensitivity";
/// In means: a hundredth of the tokens would carry up to a third of the sum, and the result fit them alone.
constexpr double kMostWeight = 8.0;
/// Outputs whose errors count together: 4 KB a row. Of SmolLM2's 1,536, groups of 512 cost 3 % of the KL.
constexpr int64_t kGroup = 1024;
/// Heads have more: their memory would be that of the layers.
constexpr int64_t kMostOutputs = 32768;

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

/// sizes / mean, clipped; of mean 1.
at::Tensor clipped(const at::Tensor& sizes, double mean) {
  const at::Tensor shares = (sizes / mean).clamp_max(kMostWeight);
  return shares / shares.mean(at::kDouble).item<double>();
}

/// Writes the gradients of all layers' outputs into the rows of the batch under way.
class Recorder {
 public:
  Recorder(PreparedModel& model, at::IntArrayRef shape) : quantizers_(model.quantizers()) {
    for (const auto& quantizer : quantizers_) {
      if (!quantizer) continue;
      Record& record = found_[quantizer->tensor()];
      record.squares = at::zeros(shape, at::kFloat);
      quantizer->set_output_hook([this, &record](const at::Tensor& output) {
        // Looked up or multiplied elsewhere than once for each token, as positions and experts are.
        if (output.numel() != count_ * record.squares.size(1) * output.size(-1)) return;
        // No weight takes a gradient here, so a table's rows are leaves, unlike what is made of other
        // outputs.
        output.requires_grad() ? watch(record, output) : watch_lookup(record, output);
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

  /// Behind the gradients of a batch.
  void end() {
    for (auto& [name, record] : found_) {
      // The rows of a table that is no head, too, count for nothing.
      if (record.batch_lookups.defined() && record.outputs > 0) {
        record.lookups.push_back(record.batch_lookups);
      }
      record.batch_lookups.reset();
    }
  }

  /// Weights that no gradient reached as a layer, such as embeddings that are not tied, are left out.
  Sensitivity take() const {
    Sensitivity result;
    for (const auto& [name, record] : found_) {
      const double mean = finite_mean(name, record.squares);
      if (mean <= 0) continue;
      result.tokens[name] = clipped(record.squares, mean);
      if (record.lookups.empty()) {
        if (record.curvature.defined()) {
          result.outputs[name] = from_upper(record.curvature) / static_cast<double>(record.tokens);
        }
        continue;
      }
      const at::Tensor lookups = at::cat(record.lookups);
      const at::Tensor sizes = (lookups * lookups).sum(-1);
      const double size = finite_mean(name, sizes);
      if (size <= 0) continue;
      // So that the square of each gradient becomes its clipped share of their sum.
      const at::Tensor factors = clipped(sizes, size) / (sizes / size).clamp_min(1e-20);
      InputMoments moments(lookups.size(-1));
      moments.add(lookups, factors);
      result.lookups[name] = moments.second() / (mean * static_cast<double>(record.outputs));
    }
    return result;
  }

 private:
  /// Of one weight, over all windows.
  struct Record {
    at::Tensor squares;               ///< float32[n, T]: mean over outputs of the squared gradient
    int64_t outputs = 0;              ///< O
    double sum = 0.0;                 ///< of `squares`, so far
    int64_t tokens = 0;               ///< in it
    at::Tensor curvature;             ///< float32[K, S, S]: symmetric sums of g g^T; undefined for heads
    at::Tensor batch_lookups;         ///< gradients of looked-up rows, float32[count, T, N]
    std::vector<at::Tensor> lookups;  ///< of all batches; empty where there are none
  };

  /// The curvature takes the tokens of one call.
  static void add_curvature(Record& record, const at::Tensor& gradient, const at::Tensor& squares) {
    const int64_t outputs = gradient.size(-1);
    if (outputs > kMostOutputs) return;
    const int64_t groups = (outputs + kGroup - 1) / kGroup, size = (outputs + groups - 1) / groups;
    if (!record.curvature.defined()) record.curvature = at::zeros({groups, size, size}, at::kFloat);
    record.sum += squares.sum(at::kDouble).item<double>();
    record.tokens += squares.numel();
    const double most = kMostWeight * record.sum / static_cast<double>(record.tokens);
    if (!(most > 0) || !std::isfinite(most)) return;
    // Divided by the bound's root, too, so that products of small gradients are no subnormals.
    const at::Tensor factors = (squares.reshape({-1, 1}) / most).clamp_min(1).rsqrt() / std::sqrt(most);
    const at::Tensor g = gradient.reshape({-1, outputs}) * factors;
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t count = std::min(size, outputs - k * size);
      const at::Tensor part = g.narrow(1, k * size, count).to(gradient.scalar_type());
      add_products(record.curvature[k].narrow(0, 0, count).narrow(1, 0, count), part, most);
    }
  }

  void watch(Record& record, const at::Tensor& output) const {
    record.outputs = output.size(-1);
    const at::Tensor squares = record.squares.narrow(0, first_, count_);
    output.register_hook([squares, &record](const at::Tensor& gradient) {
      const at::NoGradGuard no_grad;
      const NoAutocast own_dtype;
      const at::Tensor g = gradient.detach().to(at::kFloat);
      const at::Tensor found = (g * g).mean(-1).view(squares.sizes());
      squares.add_(found.cpu());
      add_curvature(record, gradient.detach(), found);
    });
  }

  void watch_lookup(Record& record, const at::Tensor& rows) const {
    rows.set_requires_grad(true);
    rows.register_hook([count = count_, &record](const at::Tensor& gradient) {
      const at::Tensor found = gradient.detach().to(at::kFloat).view({count, -1, gradient.size(-1)}).cpu();
      record.batch_lookups = record.batch_lookups.defined() ? record.batch_lookups + found : found;
    });
  }

  static double finite_mean(const std::string& name, const at::Tensor& values) {
    const double mean = values.mean(at::kDouble).item<double>();
    if (std::isfinite(mean)) return mean;
    throw NumericError(std::string(kName) + ": " + name + ": expected finite gradients, got others");
  }

  const std::vector<std::shared_ptr<Quantizer>>& quantizers_;
  std::map<std::string, Record> found_;  ///< hooks hold references into it
  int64_t first_ = 0, count_ = 0;
};

/// The summed cross-entropy with labels drawn from the model's own distribution.
at::Tensor own_loss(const at::Tensor& logits, const at::Generator& generator) {
  const at::Tensor rows = logits.reshape({-1, logits.size(-1)}).to(at::kFloat);
  const at::Tensor uniform = at::rand({rows.size(0)}, generator, at::TensorOptions(at::kDouble));
  return -at::log_softmax(rows, -1).gather(1, sample(rows, uniform).unsqueeze(1)).sum();
}

}  // namespace

Sensitivity sensitivity(PreparedModel& model,
                        const std::function<at::Tensor(const at::Tensor& tokens)>& logits,
                        const at::Tensor& windows, int64_t seed, int64_t batch, const Progress& progress) {
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
    recorder.end();
    first += part.size(0);
    if (progress) progress(first, windows.size(0), "");
  }
  return recorder.take();
}

TokenWeights token_sensitivity(PreparedModel& model,
                               const std::function<at::Tensor(const at::Tensor& tokens)>& logits,
                               const at::Tensor& windows, int64_t seed, int64_t batch,
                               const Progress& progress) {
  return sensitivity(model, logits, windows, seed, batch, progress).tokens;
}

}  // namespace qat::ptq
