#pragma once

// Fine-tuning a prepared language model on token data, with a live float teacher or with labels, resumable
// bit for bit. The trainer knows named parameters and callables, not model classes.
//
// Run folder: `run.json` (options, policy), `state.safetensors` (latents, moments, step; atomic),
// `telemetry.jsonl` (one JSON object per line). The checkpoint that ships is made by `freeze`, not by the
// trainer.

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "qat/eval/eval.hpp"
#include "qat/prepare/prepare.hpp"
#include "qat/train/token_data.hpp"

namespace qat::train {

/// Weights of the loss terms; the loss is their sum. Both are means over predicted tokens, in nats.
struct Objective {
  double kl = 1.0;  ///< KL(teacher || student) at `temperature`, times temperature^2; needs a teacher
  double ce = 0.0;  ///< cross-entropy with the next token
  double temperature = 1.0;
};

/// JSON and Python use the same names. Checked by `validate`.
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
  double weight_decay = 0.0;
  double clip_norm = 1.0;  ///< global gradient norm; 0 = off
  Objective objective;
  std::string compute_dtype =
      "auto";  ///< "float32", "bfloat16", or "auto": bfloat16 where the CPU multiplies it
  std::vector<std::string> frozen;  ///< ECMAScript expressions on parameter names (full match): not trained
  int64_t seed = 0;                 ///< order of the data
  int64_t eval_every = 0;           ///< steps between evaluations during training; 0 = never
  int64_t save_every = 25;          ///< steps between saved states; the last step is always saved
  int64_t telemetry_every =
      10;  ///< steps between flip-rate and distance measurements (loss is logged every step)
};

/// Throws ArgumentError naming the option, the value and the legal range.
void validate(const Options& options);
/// JSON with every option; `from_json` refuses unknown keys and wrong types by JSON path.
std::string to_json(const Options& options);
Options options_from_json(std::string_view json);

/// One step's telemetry, as passed to the progress callback and written to telemetry.jsonl.
struct StepReport {
  int64_t step = 0;  ///< 1-based
  int64_t steps = 0;
  double loss = 0;
  double learning_rate = 0;
  double gradient_norm = 0;
  double tokens_per_second = 0;  ///< since this process started training
  double seconds_left = 0;
  double flip_rate = -1;         ///< share of codes that differ from the last measurement; -1 = not measured
  double distance_to_grid = -1;  ///< RMS(w_hat - w) / RMS(w) over all quantized weights; -1 = not measured
  std::vector<eval::Score> evaluation;  ///< empty unless evaluated at this step
};

enum class Outcome { kFinished, kInterrupted };

class Trainer {
 public:
  /// `student`: tokens int64[B, T] -> logits [B, T, V], called inside `model.quantized()`. `teacher`: the
  /// same on the float model, or null when objective.kl is 0. `run_folder`: created if missing; "" keeps
  /// everything in memory.
  Trainer(PreparedModel& model, eval::LogitsFunction student, eval::LogitsFunction teacher, TokenData data,
          Options options, std::string run_folder);
  ~Trainer();

  /// Continue from the run folder's state. FileError when there is none or it belongs to other options or
  /// shapes.
  void resume();
  /// Held-out tokens int64[n] for `eval_every`.
  void set_evaluation(at::Tensor tokens, eval::Options options = {});
  /// Called after each step; return false to save the state and stop.
  void set_progress(std::function<bool(const StepReport&)> progress);

  /// Trains to `options.steps`. kInterrupted when progress or `request_stop` ended it; the state is saved
  /// then.
  Outcome run();
  /// Async-signal-safe: the step under way is finished, the state saved, and `run` returns kInterrupted.
  void request_stop() noexcept;

  int64_t step() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace qat::train
