#include "qat/ptq/awq.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <unordered_map>

#include "ptq/check.hpp"
#include "ptq/decode.hpp"
#include "ptq/no_autocast.hpp"
#include "ptq/scales.hpp"
#include "ptq/stage_walk.hpp"

namespace qat::ptq {
namespace {

constexpr const char* kFunction = "awq_scale";

/// Rows of a weight that the search measures.
struct Sample {
  const grid::Grid* grid;
  at::Tensor rows;  ///< contiguous float32[r, N]
};

at::Tensor every_kth_row(const at::Tensor& rows, int64_t most) {
  const int64_t count = rows.size(0);
  if (most == 0 || count <= most) return rows;
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < most; ++i) chosen.push_back(i * count / most);
  return rows.index_select(0, at::tensor(chosen));
}

std::vector<Sample> samples_of(const Subject& subject, const std::vector<at::Tensor>& weights,
                               const std::vector<std::string>& grids, int64_t most) {
  if (weights.empty() || weights.size() != grids.size()) {
    fail(subject, "weights and as many grids",
         std::to_string(weights.size()) + " and " + std::to_string(grids.size()));
  }
  std::vector<Sample> samples;
  for (size_t i = 0; i < weights.size(); ++i) {
    const grid::Grid& grid = check_coded(subject, weights[i], grids[i]);
    if (weights[i].dim() != 2 || weights[i].size(1) != weights[0].size(1)) {
      fail(subject, "weights [R, " + std::to_string(weights[0].size(-1)) + "]", describe(weights[i]));
    }
    check_finite(subject, "weight", weights[i]);
    samples.push_back({&grid, every_kth_row(rows_of(weights[i]), most).contiguous()});
  }
  return samples;
}

/// The mean of `values` over the inputs of each producer row; [rows]. No rows: the values themselves.
at::Tensor by_producer(const at::Tensor& values, const at::Tensor& rows) {
  if (!rows.defined()) return values;
  const int64_t count = rows.max().item<int64_t>() + 1;
  const at::Tensor sums = at::zeros({count}, values.options()).index_add_(0, rows, values);
  const at::Tensor counts = at::zeros({count}, values.options()).index_add_(0, rows, at::ones_like(values));
  return sums / counts.clamp_min(1.0);
}

/// s of one alpha, float64 [rows or N].
at::Tensor scale_of(const at::Tensor& magnitude, double alpha) {
  const at::Tensor power = magnitude.pow(alpha).clamp_min(1e-4);
  return power / (power.max() * power.min()).sqrt();
}

/// The squared error of the outputs when the weights are rounded under s.
double error_under(std::string_view tensor, const std::vector<Sample>& samples, ScaleSource source,
                   const at::Tensor& s, const at::Tensor& hessian, const at::Tensor& diagonal) {
  const at::Tensor importance = diagonal / (s * s).to(at::kDouble);
  double sum = 0.0;
  for (const Sample& sample : samples) {
    const at::Tensor scaled = sample.rows * s;
    const at::Tensor scales = choose_scales(kFunction, tensor, *sample.grid, {source}, scaled, importance);
    const at::Tensor difference = sample.rows - decoded(kFunction, tensor, *sample.grid, scaled, scales) / s;
    sum += (at::mm(difference, hessian) * difference).sum(at::kDouble).item<double>();
  }
  return sum;
}

void check_options(const Subject& subject, const AwqOptions& options) {
  if (options.steps < 1) fail(subject, "steps of at least 1", std::to_string(options.steps));
  if (options.rows < 0) fail(subject, "rows of at least 0", std::to_string(options.rows));
}

}  // namespace

AwqScale awq_scale(const std::vector<at::Tensor>& weights, const std::vector<std::string>& grids,
                   const at::Tensor& hessian, const at::Tensor& magnitude, const AwqOptions& options,
                   const std::vector<int64_t>& producer_rows, std::string_view tensor) {
  const at::NoGradGuard no_grad;
  const NoAutocast full_precision;
  const Subject subject{kFunction, tensor};
  check_options(subject, options);
  const std::vector<Sample> samples = samples_of(subject, weights, grids, options.rows);
  const int64_t n = samples[0].rows.size(1);
  const at::Tensor h = checked_statistics(subject, "hessian", hessian, {n, n});
  const at::Tensor means = checked_statistics(subject, "magnitude", magnitude, {n});
  const at::Tensor rows = producer_rows.empty() ? at::Tensor() : at::tensor(producer_rows);
  if (rows.defined() && rows.size(0) != n) {
    fail(subject, "a producer row for each of " + std::to_string(n) + " inputs", describe(rows));
  }
  const at::Tensor per_row = by_producer(means, rows);
  const at::Tensor diagonal = h.diagonal().clamp_min(0.0).contiguous(), single = h.to(at::kFloat);
  AwqScale best;
  double least = std::numeric_limits<double>::infinity(), plain = 0.0;
  for (int64_t step = 0; step <= options.steps; ++step) {
    const double alpha = static_cast<double>(step) / static_cast<double>(options.steps);
    at::Tensor s = scale_of(per_row, alpha).to(at::kFloat);
    if (rows.defined()) s = s.index_select(0, rows);
    const double error = error_under(tensor, samples, options.scale, s, single, diagonal);
    if (step == 0) plain = error;
    if (!(error < least)) continue;
    least = error;
    best = {s, alpha, plain > 0.0 ? error / plain : 1.0};
  }
  return best;
}

namespace {

/// What the float pass found of one stage.
struct Found {
  const Stage* stage;
  std::vector<StageWeight> weights;
  at::Tensor diagonal;            ///< of E[x x^T], float64[N]
  std::optional<AwqScale> scale;  ///< empty: nothing to fold
};

/// Stages with quantized weights, measured on the float model.
std::vector<Found> measure(PreparedModel& model, const std::vector<Stage>& stages, const at::Tensor& windows,
                           const AwqOptions& options, const CalibrationOptions& calibration) {
  const EnabledScope as_float(model, false);
  StageWalk walk("apply_awq", model, stages, windows, calibration);
  std::vector<Found> all;
  while (const Stage* stage = walk.stage()) {
    // A tied table has no producer: it only gets its scales here.
    Found found{stage, stage->tied ? walk.weights_to_round() : walk.weights(), {}, {}};
    std::vector<at::Tensor> weights;
    std::vector<std::string> grids;
    for (const StageWeight& weight : found.weights) {
      if (!weight.has_codes()) continue;
      weights.push_back(weight.latent);
      grids.push_back(weight.quantizer->scheme().weight);
    }
    const auto moments = walk.advance(/*measure=*/!weights.empty());
    if (!moments) continue;
    const at::Tensor hessian = moments->second();
    found.diagonal = hessian.diagonal().clone();
    if (!stage->producers.empty()) {
      found.scale = awq_scale(weights, grids, hessian, moments->magnitude(), options, stage->producer_rows,
                              stage->weights.front());
    }
    all.push_back(std::move(found));
  }
  return all;
}

/// Divides the entries or rows of a producer by the s of the inputs that they make.
void divide(const at::Tensor& producer, const at::Tensor& s, const std::vector<int64_t>& rows) {
  at::Tensor by = s;
  if (!rows.empty()) by = at::ones({producer.size(0)}, s.options()).index_copy_(0, at::tensor(rows), s);
  by = by.to(producer.device());
  producer.detach().div_(producer.dim() > 1 ? by.unsqueeze(1) : by);
}

AwqFold fold(PreparedModel& model, const Found& found) {
  std::unordered_map<std::string, at::Tensor> parameters;
  for (const auto& item : model.module().named_parameters()) parameters[item.key()] = item.value();
  const at::Tensor& s = found.scale->scale;
  for (const std::string& name : found.stage->producers) {
    const auto parameter = parameters.find(name);
    if (parameter == parameters.end())
      fail({"apply_awq", name}, "a parameter of the model", "none of that name");
    divide(parameter->second, s, found.stage->producer_rows);
  }
  for (const StageWeight& weight : found.weights) weight.latent.detach().mul_(s.to(weight.latent.device()));
  return {found.stage->producers, found.stage->weights, found.scale->alpha, found.scale->error};
}

/// The grid's scales for the weights as they are now.
void set_scales(const Found& found, ScaleSource source) {
  at::Tensor importance = found.diagonal.clamp_min(0.0);
  if (found.scale) importance = importance / (found.scale->scale * found.scale->scale).to(at::kDouble);
  for (const StageWeight& weight : found.weights) {
    if (!weight.has_codes()) continue;
    const grid::Grid& grid = grid::find(weight.quantizer->scheme().weight);
    const ScaleChoice choice{source, weight.quantizer->tied()};
    weight.quantizer->set_field_scales(choose_scales("apply_awq", weight.name, grid, choice,
                                                     rows_of(weight.quantizer->matrix(weight.latent)),
                                                     importance));
  }
}

}  // namespace

std::vector<AwqFold> apply_awq(PreparedModel& model, const std::vector<Stage>& stages,
                               const at::Tensor& windows, const AwqOptions& options,
                               const CalibrationOptions& calibration) {
  const at::NoGradGuard no_grad;
  check_learned("apply_awq", model);
  check_options({"apply_awq", "options"}, options);
  const std::vector<Found> all = measure(model, stages, windows, options, calibration);
  std::vector<AwqFold> folds;
  for (const Found& found : all) {
    if (found.scale) folds.push_back(fold(model, found));
  }
  for (const Found& found : all) set_scales(found, options.scale);
  return folds;
}

}  // namespace qat::ptq
