#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "qat/train/objective.hpp"

namespace qat::train {

/// A grid of more bits that weights train in at first. See Options::progressive.
struct Stage {
  std::string grid;
  double until = 0;  ///< the share of the steps after which the next stage begins
  bool operator==(const Stage&) const = default;
};

/// Blocks of the model that begin to train one after another. A block is the number in a parameter's name
/// ("model.layers.3.mlp..."); what is in no block trains throughout.
struct Unfreeze {
  std::string from = "last";  ///< the block that begins: "first" or "last"
  double until = 0;           ///< the share of the steps after which all of them train; 0 = from the start
};

/// What is done about weights that jump between two codes. (Nagel et al. 2022, arXiv:2203.11086)
struct Oscillation {
  double momentum = 0.01;   ///< of the averages of turns and codes
  double freeze_above = 0;  ///< a weight whose average of turns per step exceeds it is held; 0 = off
  /// Weight, at the end of the run, of sum (w - w_hat)^2 in the loss; it rises along half a cosine. 0 = off
  double damping = 0;
};

/// Weights drawn to the grid instead of rounded in forward. (PARQ; Jin et al. 2025, arXiv:2503.15748)
struct Prox {
  double until = 0;       ///< the share of the steps after which they are on it, and are rounded; 0 = off
  double steepness = 10;  ///< of the sigmoid along which they approach it
};

/// Settings of a training run. JSON and Python use the same names. Checked by `validate`.
struct Options {
  int64_t steps = 100;            ///< optimizer steps
  int64_t batch_size = 2;         ///< sequences per micro-batch
  int64_t sequence_length = 256;  ///< tokens per sequence
  int64_t accumulate = 1;         ///< micro-batches per optimizer step
  double learning_rate = 1e-4;    ///< peak
  /// Peak for learned scales, in units of the mean |scale| of a tensor and field at the start; 0 holds them.
  double scale_learning_rate = 1e-3;
  double warmup = 0.1;                ///< share of steps with linear warm-up
  double final_learning_rate = 0.05;  ///< the cosine ends at this share of the peak
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.0;  ///< decoupled (AdamW)
  double clip_norm = 1.0;     ///< global gradient norm; 0 = off
  Objective objective;
  /// Positions whose logits exist at a time when the student comes in halves; 0 = equal pieces of at
  /// most 2^24 logits, or 128 rows. See `head_loss`.
  int64_t loss_chunk = 0;
  /// "float32", "bfloat16" (by autocast) or "auto"; see `compute_dtype`. Latents stay float32.
  std::string compute_dtype = "auto";
  /// ECMAScript expressions; parameters whose name, with or without its trailing ".weight", matches one in
  /// full are not trained. Tied parameters share the first name.
  std::vector<std::string> frozen;
  double ema = 0;    ///< decay of the average of all that trains, which evaluation and result use; 0 = off
  double delay = 0;  ///< share of the steps in which forward does not round
  double blend = 0;  ///< share of the steps, after these, in which rounding is blended in
  std::vector<Stage> progressive = {};  ///< for weights that ship in fewer bits than a stage's grid
  Unfreeze unfreeze = {};
  Oscillation oscillation = {};
  Prox prox = {};
  int64_t seed = 0;         ///< order of the data, and random layers
  int64_t eval_every = 0;   ///< steps between evaluations during training; 0 = never
  int64_t save_every = 25;  ///< steps between saved states; 0 = only the last step, which always is saved
  int64_t telemetry_every = 10;  ///< steps between the measurements of StepReport; 0 = never (the loss is
                                 ///< logged every step)
};

/// Throws ArgumentError naming the option, the value and the legal range.
void validate(const Options& options);

/// JSON with every option, `objective` as an object.
std::string to_json(const Options& options);

/// Options left out keep their defaults. ArgumentError naming the JSON path for unknown keys, wrong types and
/// values that `validate` refuses.
Options options_from_json(std::string_view json);

/// The learning rate of a step. step: 1 ... options.steps. Rises linearly to the peak at the last of the
/// round(warmup * steps) warm-up steps, then falls along half a cosine to final_learning_rate * peak, which
/// the last step has.
double learning_rate_at(const Options& options, int64_t step) noexcept;

}  // namespace qat::train
