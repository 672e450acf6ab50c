#pragma once

// Fine-tuning a prepared language model on token data, with a live float teacher, its cached answers, or
// labels, resumable bit for bit. The trainer knows named parameters and callables, not model classes.
//
// Run folder: `run.json` (options, policy, fingerprint of the text), `state.safetensors` (latents, moments,
// step; atomic), `telemetry.jsonl` (one JSON object per line). The checkpoint that ships is made by `freeze`,
// not by the trainer.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "qat/eval/eval.hpp"
#include "qat/prepare/prepare.hpp"
#include "qat/train/language_model.hpp"
#include "qat/train/options.hpp"
#include "qat/train/teacher_cache.hpp"
#include "qat/train/token_data.hpp"

namespace qat::train {

/// One step's telemetry, as passed to the progress callback and written to telemetry.jsonl.
struct StepReport {
  int64_t step = 0;  ///< 1-based
  int64_t steps = 0;
  double loss = 0;
  double learning_rate = 0;
  double gradient_norm = 0;
  double tokens_per_second = 0;  ///< since this process started training
  double seconds_left = 0;
  /// Over the weights on integer grids that train, at the end of this step; -1 = not measured.
  double flip_rate = -1;         ///< share of codes that differ from the last measurement
  double oscillation = -1;       ///< share of codes that also changed the other way than the last time
  double clip_rate = -1;         ///< share of weights beyond the range of their scale
  double scale_drift = -1;       ///< RMS change of the scales since the start, in units of their field's mean
  double distance_to_grid = -1;  ///< RMS(w_hat - w) / RMS(w)
  /// By grid: the share of the codes that no weight of a tensor has. Empty when not measured.
  std::map<std::string, double> dead_codes = {};
  /// KL(teacher || student) on the probe, a micro-batch that the run does not train on (of the evaluation
  /// tokens, else the first batch after the run's last, which a short text may have had before), of what
  /// would ship; at temperature 1, or a cache's. And the same before the first step. -1 = not measured.
  double probe_kl = -1;
  double probe_kl_start = -1;
  /// Empty unless evaluated at this step; else the teacher's score (if there is one) and the student's.
  std::vector<eval::Score> evaluation;
};

/// One line of telemetry.jsonl, without the line break. What was not measured is left out.
std::string to_json(const StepReport& report);

/// How `Trainer::run` ended.
enum class Outcome { kFinished, kInterrupted };

/// One run: from its options, or from its folder, to the last step.
class Trainer {
 public:
  /// `model` must outlive the trainer. `student`: called inside `model.quantized()`; in halves (see
  /// `in_halves`) its logits never exist in full, see `head_loss`. `teacher`: the float model, or null when
  /// the objective needs none. Both are called under autocast when the compute dtype is bfloat16.
  /// `run_folder`: created if missing; "" keeps everything in memory. ArgumentError for bad options, a
  /// missing teacher, latents that are not float32, a `frozen` expression that matches nothing or is
  /// malformed, and text shorter than one sequence.
  Trainer(PreparedModel& model, LanguageModel student, LanguageModel teacher, TokenData data, Options options,
          std::string run_folder);
  /// The same with a teacher's answers from disk. ArgumentError when they are for other windows, text or
  /// temperature than the options ask for, and when the objective needs no teacher.
  Trainer(PreparedModel& model, LanguageModel student, TeacherCache teacher, TokenData data, Options options,
          std::string run_folder);
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// Continue from the run folder's state, as if never interrupted; telemetry after that step is dropped.
  /// FileError when there is none or it belongs to other options (eval_every and save_every may differ),
  /// another policy, text or shapes.
  void resume();
  /// Held-out tokens int64[n] for `eval_every`.
  void set_evaluation(at::Tensor tokens, eval::Options options = {});
  /// Called after each step; return false to save the state and stop.
  void set_progress(std::function<bool(const StepReport&)> progress);

  /// Trains to `options.steps`. With options.ema the parameters are then the averages. kInterrupted when
  /// progress or `request_stop` ended it; the state is saved then, and `run` may be called again. The step's
  /// number and `seed` seed the default random generator before each step. FileError when the folder holds
  /// another run's state and `resume` was not called. NumericError naming the step for a loss or gradient
  /// that is not finite; the latents are then those of the step before, and the last saved state stays.
  Outcome run();
  /// Async-signal-safe: the step under way is finished, the state saved, and `run` returns kInterrupted.
  void request_stop() noexcept;

  int64_t step() const noexcept;  ///< optimizer steps done

  /// What a user should know about the run so far: empty when the probe's KL is below that of the start, else
  /// that it is not, and what in telemetry explains it.
  std::vector<std::string> warnings() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace qat::train
