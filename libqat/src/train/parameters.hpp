#pragma once

#include <torch/nn/module.h>

#include <string>
#include <vector>

#include "qat/grid/grid.hpp"
#include "qat/prepare/prepare.hpp"
#include "qat/train/options.hpp"
#include "train/scale_steps.hpp"

namespace qat::train {

struct NamedParameter {
  std::string name;
  at::Tensor value;
};

/// The parameters that a run trains: those of the module, and the learned scales of the trained weights among
/// them. For the object's lifetime exactly these require a gradient; afterwards every parameter requires what
/// it did before.
class TrainedParameters {
 public:
  /// Everything that options.frozen does not match trains. A tied parameter goes by its first name. A frozen
  /// weight's scales are held, and all scales are when options.scale_learning_rate is 0. `model` must outlive
  /// it. ArgumentError for an expression that matches no name, for nothing left to train, and for a trained
  /// parameter that is not float32.
  TrainedParameters(PreparedModel& model, const Options& options);
  ~TrainedParameters();
  TrainedParameters(const TrainedParameters&) = delete;
  TrainedParameters& operator=(const TrainedParameters&) = delete;

  const std::vector<NamedParameter>& trained() const noexcept { return trained_; }
  std::vector<at::Tensor> values() const;
  /// The learned scales that train, as the model holds them now: a change of grid makes other tensors.
  std::vector<TrainedScale> scales();

 private:
  struct Before {
    at::Tensor value;
    bool required;
  };
  bool trains(const std::string& name) const;

  PreparedModel& model_;
  std::vector<NamedParameter> trained_;
  std::vector<std::string> held_scales_;  ///< names
  bool scales_train_;
  std::vector<Before> before_;
};

/// A weight on an integer grid whose latent trains.
struct TrainedWeight {
  std::string name;
  at::Tensor latent;  ///< float32[R, ...]
  std::shared_ptr<Quantizer> quantizer;
};

/// The weights of `model` that are on an integer grid and require a gradient.
std::vector<TrainedWeight> trained_weights(const PreparedModel& model);

/// `gradient` (like the latent) where the unrounded code of a weight is inside the range of its grid, else 0.
at::Tensor where_in_range(const TrainedWeight& weight, const at::Tensor& gradient);

/// How many scale parameters of a block are of one kind: those of each field of the grid.
std::vector<int> field_sizes(const grid::Grid& grid);
/// The same of the parameters that a quantizer with learned scales trains.
std::vector<int> parameter_sizes(const Quantizer& quantizer);

/// The grid that forward uses: the quantizer's training grid, or else its scheme's.
const std::string& grid_of(const Quantizer& quantizer);

}  // namespace qat::train
