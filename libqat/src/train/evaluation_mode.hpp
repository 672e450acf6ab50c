#pragma once

#include <torch/nn/module.h>

#include <functional>
#include <utility>
#include <vector>

namespace qat::train {

/// Switches a module to evaluation (dropout off, ...), and every part of it back to what it was.
class EvaluationMode {
 public:
  explicit EvaluationMode(torch::nn::Module& module) {
    for (const auto& part : module.modules(/*include_self=*/false))
      before_.emplace_back(*part, part->is_training());
    before_.emplace(before_.begin(), module, module.is_training());
    module.eval();
  }
  ~EvaluationMode() {
    // Parents come before their parts, and `train` descends.
    for (auto& [part, training] : before_) part.get().train(training);
  }
  EvaluationMode(const EvaluationMode&) = delete;
  EvaluationMode& operator=(const EvaluationMode&) = delete;

 private:
  std::vector<std::pair<std::reference_wrapper<torch::nn::Module>, bool>> before_;
};

}  // namespace qat::train
