#pragma once

// Runs of the block model under a schedule, and what their state holds.

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <functional>

#include "qat/io/safetensors.hpp"
#include "qat/train/trainer.hpp"
#include "train/scratch_folder.hpp"
#include "train/tiny_blocks.hpp"
#include "train/tiny_run.hpp"

using qat::Quantizer;
using qat::train::Options;
using qat::train::Outcome;
using qat::train::StepReport;
using qat::train::Trainer;
using Change = std::function<void(Options&)>;
using Watch = std::function<bool(const StepReport&)>;

inline Options options_with(const Change& change) {
  Options options = tiny_options();
  options.scale_learning_rate = 2e-2;
  change(options);
  return options;
}

/// A process's life: its own model, and a trainer on the run folder.
struct Life {
  explicit Life(const Options& options, const std::string& folder = "",
                const qat::eval::LogitsFunction& student = nullptr)
      : trainer(*setup.model, student ? student : setup.student_function(), setup.teacher_function(),
                tiny_data(), options, folder) {}

  Outcome run(const Watch& watch = nullptr) {
    trainer.set_progress(watch);
    return trainer.run();
  }
  /// Of blocks 0 to 2 and of the head, 3; slot 0 is the embedding, which stays float.
  Quantizer& quantizer(std::size_t place) { return *setup.model->quantizers()[place + 1]; }

  BlocksSetup setup;
  Trainer trainer;
};

/// All that trains, in one row.
inline at::Tensor everything(BlocksSetup& setup) {
  std::vector<at::Tensor> parts;
  for (const at::Tensor& parameter : setup.student->parameters()) {
    parts.push_back(parameter.detach().reshape({-1}));
  }
  for (const auto& scale : setup.model->scale_parameters())
    parts.push_back(scale.value.detach().reshape({-1}));
  return at::cat(parts);
}

inline at::Tensor tensor_of(const std::string& folder, const std::string& key) {
  const qat::io::SafetensorsFile file(folder + "/state.safetensors");
  const auto& saved = file.at(key);
  const auto type = saved.dtype == qat::io::Dtype::kF32 ? at::kFloat : at::kChar;
  at::Tensor tensor = at::empty(saved.shape, at::TensorOptions(type));
  std::memcpy(tensor.mutable_data_ptr(), saved.data.data(), saved.data.size());
  return tensor;
}

inline at::Tensor codes_of(Quantizer& quantizer, const at::Tensor& latent) {
  return std::get<0>(quantizer.quantize(latent.detach()));
}
