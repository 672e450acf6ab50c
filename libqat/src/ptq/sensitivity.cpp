#include "qat/ptq/sensitivity.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/rand.h>
#include <c10/core/GradMode.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "ptq/check.hpp"
#include "ptq/stage_walk.hpp"
#include "qat/ops/sample.hpp"
#include "qat/ptq/layer_sensitivity.hpp"

namespace qat::ptq {
namespace {

constexpr const char* kName = "token_sensitivity";
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

/// Hands the gradients of all layers' outputs to their sums.
class Recorder {
 public:
  Recorder(PreparedModel& model, at::IntArrayRef shape)
      : quantizers_(model.quantizers()), shape_(shape.begin(), shape.end()) {
    for (const auto& quantizer : quantizers_) {
      if (!quantizer) continue;
      Record& record = found_.try_emplace(quantizer->tensor(), quantizer->tensor()).first->second;
      quantizer->set_output_hook([this, &record](const at::Tensor& output) {
        // Looked up or multiplied elsewhere than once for each token, as positions and experts are.
        if (output.numel() != count_ * shape_[1] * output.size(-1)) return;
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

  /// Ahead of a batch of so many windows.
  void begin(int64_t count) { count_ = count; }

  /// Behind the gradients of a batch.
  void end() {
    for (auto& [name, record] : found_) {
      // The rows of a table that is no head, too, count for nothing.
      if (record.lookups.defined() && record.multiplies) record.sums.add_lookups(record.lookups);
      record.lookups.reset();
    }
  }

  /// Weights that no gradient reached as a layer, such as embeddings that are not tied, are left out.
  Sensitivity take() const {
    Sensitivity result;
    for (const auto& [name, record] : found_) {
      if (!record.sums.counts()) continue;
      result.tokens[name] = record.sums.tokens().view(shape_);
      if (const at::Tensor outputs = record.sums.outputs(); outputs.defined()) result.outputs[name] = outputs;
      if (const at::Tensor lookups = record.sums.lookups(); lookups.defined()) result.lookups[name] = lookups;
    }
    return result;
  }

 private:
  /// Of one weight, over all windows.
  struct Record {
    explicit Record(const std::string& name) : sums(name) {}
    LayerSensitivity sums;
    bool multiplies = false;
    at::Tensor lookups;  ///< gradients of the rows that the batch looked up, float32[count, T, N]
  };

  static void watch(Record& record, const at::Tensor& output) {
    record.multiplies = true;
    const int64_t place = record.sums.expect(output.numel() / output.size(-1));
    output.register_hook([place, &record](const at::Tensor& gradient) { record.sums.add(place, gradient); });
  }

  void watch_lookup(Record& record, const at::Tensor& rows) const {
    rows.set_requires_grad(true);
    rows.register_hook([count = count_, &record](const at::Tensor& gradient) {
      const at::Tensor found = gradient.detach().to(at::kFloat).view({count, -1, gradient.size(-1)}).cpu();
      record.lookups = record.lookups.defined() ? record.lookups + found : found;
    });
  }

  const std::vector<std::shared_ptr<Quantizer>>& quantizers_;
  std::vector<int64_t> shape_;           ///< n, T
  std::map<std::string, Record> found_;  ///< hooks hold references into it
  int64_t count_ = 0;
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
  int64_t done = 0;
  for (const at::Tensor& part : windows.split(batch)) {
    recorder.begin(part.size(0));
    const at::Tensor found = logits(part);
    if (!found.requires_grad()) {
      fail({kName, "logits"}, "logits that depend on a float parameter of the model", "constant ones");
    }
    own_loss(found, generator).backward();
    recorder.end();
    done += part.size(0);
    if (progress) progress(done, windows.size(0), "");
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
