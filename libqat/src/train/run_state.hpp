#pragma once

// What a run needs to go on as if it had never stopped, in one safetensors file.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "qat/train/options.hpp"

namespace qat::train {

/// What a run is: two states of the same run agree in all of it.
struct RunIdentity {
  Options options;  ///< with `compute_dtype` resolved
  std::string policy;
  std::uint64_t text = 0;  ///< TokenData::fingerprint()
  /// Of a cached teacher: top_k, and the fingerprint of the model; top_k 0 = a live one, or none.
  int64_t teacher_top_k = 0;
  std::uint64_t teacher = 0;

  /// {"options": ..., "policy": ..., "text": "<hex>"}, with a cache also "teacher": {"top_k": ...,
  /// "fingerprint": "<hex>"}: run.json.
  std::string to_json() const;
};

/// A tensor of the state: "latent/<name>", "exp_avg/<name>", "exp_avg_sq/<name>", "scales/<name>",
/// "buffer/<name>", and those of measurements and schedules.
struct StateTensor {
  std::string key;
  at::Tensor value;
};

/// Writes atomically. Same tensors, step and identity, same bytes.
void save_state(const std::string& path, const std::vector<StateTensor>& tensors, int64_t step,
                const RunIdentity& identity);

/// Copies the file into `tensors` and returns its step. FileError, before anything is copied, when the file
/// is missing or malformed, when its identity differs (naming the option; eval_every and save_every may
/// differ) or a tensor is missing, extra or of another type or shape.
int64_t load_state(const std::string& path, const std::vector<StateTensor>& tensors,
                   const RunIdentity& identity);

/// The step that a state file was saved at, for a run of this identity. FileError as `load_state`, tensors
/// aside.
int64_t read_state_step(const std::string& path, const RunIdentity& identity);

}  // namespace qat::train
