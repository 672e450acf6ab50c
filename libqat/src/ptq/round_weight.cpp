#include "ptq/round_weight.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>

#include "ptq/check.hpp"
#include "ptq/decode.hpp"
#include "ptq/no_autocast.hpp"
#include "qat/grid/grid.hpp"
#include "qat/ptq/expected_kl.hpp"
#include "qat/ptq/input_correction.hpp"

namespace qat::ptq {
namespace {

/// Weights that are solved together: 128 MB of float32, of which a solution takes a few copies.
constexpr int64_t kPart = int64_t{1} << 25;

/// Rows that are solved together: no row's solution depends on another's, unless they share a scale or a
/// group of outputs.
int64_t rows_of_a_part(const at::Tensor& weight, const grid::Grid& grid, const at::Tensor& outputs) {
  const int64_t rows = weight.size(0);
  if (grid.info().block == grid::kWholeTensor) return rows;
  const int64_t fitting = std::clamp(kPart / (weight.numel() / rows), int64_t{1}, rows);
  if (!outputs.defined() || fitting == rows) return fitting;
  const int64_t group = outputs.size(1);
  return std::max(group, fitting / group * group);
}

/// The curvatures of the rows from `first` on; undefined where there are none.
at::Tensor part_of(const at::Tensor& outputs, int64_t first, int64_t rows) {
  if (!outputs.defined()) return {};
  const int64_t group = outputs.size(1);
  return outputs.narrow(0, first / group, (rows + group - 1) / group);
}

/// tr(W H W^T); rows: float32[r, N], hessian: float32[N, N].
double energy(const at::Tensor& rows, const at::Tensor& hessian) {
  return (at::mm(rows, hessian) * rows).sum(at::kDouble).item<double>();
}

/// Sums over the rows rounded so far: of what they give, and of their errors.
struct Energies {
  double outputs = 0.0, errors = 0.0;
  std::optional<double> expected_kl = {};

  RoundedTensor result(const StageWeight& weight) const {
    const double share = outputs > 0.0 ? std::max(0.0, errors) / outputs : 0.0;
    return {weight.name, weight.quantizer->scheme().weight, std::sqrt(share), expected_kl};
  }
};

/// Rounds `rows` of a weight, which are its rows from `begin` on.
void round_rows(const StageWeight& weight, const at::Tensor& rows, int64_t begin, const Evidence& evidence,
                const Solve& solve, Energies& energies) {
  Quantizer& quantizer = *weight.quantizer;
  const grid::Grid& grid = grid::find(quantizer.scheme().weight);
  const bool whole = grid.info().block == grid::kWholeTensor;
  const int64_t count = rows.size(0), step = rows_of_a_part(rows, grid, evidence.outputs);
  const at::Tensor hessian = evidence.moments.hessian.to(at::kFloat);
  at::Tensor correction;
  if (evidence.moments.drift.defined()) {
    correction = input_correction(evidence.moments.hessian, evidence.moments.drift, evidence.correction,
                                  evidence.damping, weight.name);
  }
  const at::Tensor scales = quantizer.field_scales().detach().clone();
  for (int64_t first = 0; first < count; first += step) {
    const int64_t place = begin + first;
    const std::string name =
        place == 0 ? weight.name : weight.name + ", from row " + std::to_string(place) + " on";
    const at::Tensor part = rows.narrow(0, first, std::min(step, count - first));
    const at::Tensor before = rows_of(part).clone();
    at::Tensor target = part;
    if (correction.defined())
      target = (before + at::mm(before, correction)).view(part.sizes()).to(part.device());
    const at::Tensor curvature = part_of(evidence.outputs, first, part.size(0));
    const Solution solution = solve({target, evidence.moments.hessian, curvature, quantizer, name});
    const at::Tensor shipped =
        decoded("round_weight", name, grid, rows_of(solution.latent), solution.scales.cpu());
    energies.outputs += energy(before, hessian);
    energies.errors += energy(before - shipped, hessian);
    if (curvature.defined()) {
      const double kl = expected_kl(rows_of(target) - shipped, hessian, curvature);
      energies.expected_kl = energies.expected_kl.value_or(0.0) + kl;
    }
    (whole ? scales : scales.narrow(0, place, part.size(0))).copy_(solution.scales);
    part.copy_(solution.latent);
    quantizer.set_field_scales(scales);
  }
}

}  // namespace

RoundedTensor round_weight(const StageWeight& weight, const Evidence& evidence, const Solve& solve) {
  const NoAutocast full_precision;
  Energies energies;
  round_rows(weight, weight.latent.detach(), 0, evidence, solve, energies);
  return energies.result(weight);
}

RoundedTensor round_stack(const StageWeight& weight,
                          const std::function<std::optional<LayerMoments>(int64_t expert)>& moments,
                          const Solve& solve) {
  const NoAutocast full_precision;
  const at::Tensor stack = weight.latent.detach();
  Energies energies;
  for (int64_t expert = 0; expert < stack.size(0); ++expert) {
    if (std::optional<LayerMoments> found = moments(expert)) {
      round_rows(weight, stack[expert], expert * stack.size(1), {*std::move(found)}, solve, energies);
    }
  }
  return energies.result(weight);
}

}  // namespace qat::ptq
