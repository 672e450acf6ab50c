#pragma once

#include <torch/nn/module.h>

#include <string>
#include <vector>

namespace qat::train {

struct NamedParameter {
  std::string name;
  at::Tensor value;
};

/// The parameters of a module that a run trains. For the object's lifetime exactly these require a gradient;
/// afterwards every parameter requires what it did before.
class TrainedParameters {
 public:
  /// frozen: see Options. A tied parameter goes by its first name. ArgumentError for an expression that
  /// matches no name, for nothing left to train, and for a trained parameter that is not float32.
  TrainedParameters(const torch::nn::Module& module, const std::vector<std::string>& frozen);
  ~TrainedParameters();
  TrainedParameters(const TrainedParameters&) = delete;
  TrainedParameters& operator=(const TrainedParameters&) = delete;

  const std::vector<NamedParameter>& trained() const noexcept { return trained_; }
  std::vector<at::Tensor> values() const;

 private:
  struct Before {
    at::Tensor value;
    bool required;
  };
  std::vector<NamedParameter> trained_;
  std::vector<Before> before_;
};

}  // namespace qat::train
