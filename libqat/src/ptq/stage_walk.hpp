#pragma once

// Calibration windows on their way through the stages of a model.

#include <optional>
#include <vector>

#include "qat/ptq/apply.hpp"
#include "qat/ptq/calibration.hpp"
#include "qat/ptq/input_correction.hpp"

namespace qat::ptq {

/// What a stage's weights belong to in the prepared model. Either may be null: a float weight has no
/// quantizer.
struct StageWeight {
  std::string name;
  at::Tensor latent;
  std::shared_ptr<Quantizer> quantizer;

  /// Whether there are codes to choose: with a quantizer, on a grid that is not a float type.
  bool has_codes() const;
};

/// What the windows say of one weight. N: its row length.
struct LayerMoments {
  at::Tensor hessian;  ///< float64[N, N]: E[s x x^T] of the layer's inputs, s the weight's tokens
  at::Tensor drift;    ///< float64[N, N]: E[s (x* - x) x^T]; undefined where it does not count
};

/// Steps all windows through one stage after the other.
class StageWalk {
 public:
  /// function: for messages. ArgumentError for windows that are not int64[n, T] and for a batch below 1.
  StageWalk(std::string function, PreparedModel& model, const std::vector<Stage>& stages,
            const at::Tensor& windows, const CalibrationOptions& calibration);

  /// The next stage, or null behind the last one.
  const Stage* stage() const noexcept { return next_ < stages_.size() ? &stages_[next_] : nullptr; }
  /// The weights of the next stage.
  std::vector<StageWeight> weights() const { return weights_of(stages_[next_]); }
  /// Those that a method rounds: with codes to choose, and of a table that is also a head, on
  /// a grid where the head's inputs make a difference.
  std::vector<StageWeight> weights_to_round() const { return to_round(stages_[next_]); }
  /// Whether there are such tables.
  bool rounds_tables() const;
  /// Runs the next stage on all windows. Moments of what it leaves if `measure`.
  std::optional<InputMoments> advance(bool measure);
  /// Runs the next stage on all windows, and on those of the float model where their difference counts. The
  /// moments of what it leaves for each of `weights`, which the caller may round then, but no others before
  /// the next call; none for a stage of experts, see `expert_moments`. ArgumentError for tokens of another
  /// shape than the windows'.
  std::vector<LayerMoments> advance(const std::vector<StageWeight>& weights);
  /// Of the input that the stage of experts just run left for one of them; nothing when no token chose it.
  /// All its tokens count alike, and without drift: the float model sends other tokens.
  std::optional<LayerMoments> expert_moments(int64_t expert) const;

 private:
  std::vector<StageWeight> weights_of(const Stage& stage) const;
  std::vector<StageWeight> to_round(const Stage& stage) const;
  template <class Visit>
  void run_next(const Visit& visit);
  void run_float(const Stage& stage);
  std::vector<at::Tensor> token_weights(const std::vector<StageWeight>& weights) const;

  std::string function_;
  PreparedModel& model_;
  const std::vector<Stage>& stages_;
  CalibrationOptions calibration_;
  std::vector<std::vector<at::Tensor>> states_;        ///< of each batch of windows
  std::vector<std::vector<at::Tensor>> float_states_;  ///< the float model's, where they count
  /// Weights of the stage before, as they were, which the next float step applies.
  std::vector<std::pair<at::Tensor, at::Tensor>> originals_;
  std::vector<int64_t> shape_;  ///< of the windows
  size_t next_ = 0;
  int64_t done_ = 0;
};

/// Turns all quantizers on or off for its lifetime.
class EnabledScope {
 public:
  EnabledScope(PreparedModel& model, bool enabled);
  ~EnabledScope();
  EnabledScope(const EnabledScope&) = delete;
  EnabledScope& operator=(const EnabledScope&) = delete;

 private:
  std::vector<std::pair<std::shared_ptr<Quantizer>, bool>> before_;
};

/// Throws ArgumentError unless all quantizers of the model have learned scales, or none to learn (bf16, say).
void check_learned(const std::string& function, const PreparedModel& model);

}  // namespace qat::ptq
