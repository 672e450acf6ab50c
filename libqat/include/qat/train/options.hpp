#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "qat/train/objective.hpp"

namespace qat::train {

/// Settings of a training run. JSON and Python use the same names. Checked by `validate`.
struct Options {
  int64_t steps = 100;                ///< optimizer steps
  int64_t batch_size = 2;             ///< sequences per micro-batch
  int64_t sequence_length = 256;      ///< tokens per sequence
  int64_t accumulate = 1;             ///< micro-batches per optimizer step
  double learning_rate = 1e-4;        ///< peak
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
  int64_t seed = 0;         ///< order of the data, and random layers
  int64_t eval_every = 0;   ///< steps between evaluations during training; 0 = never
  int64_t save_every = 25;  ///< steps between saved states; 0 = only the last step, which always is saved
  int64_t telemetry_every = 10;  ///< steps between flip-rate and distance measurements; 0 = never (loss is
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
