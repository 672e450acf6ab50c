#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>

#include "callables.hpp"
#include "module.hpp"
#include "qat/ops/seq.hpp"
#include "qat/ptq/apply.hpp"
#include "qat/ptq/awq.hpp"
#include "qat/ptq/calibration.hpp"
#include "qat/ptq/gptq.hpp"
#include "qat/ptq/guided.hpp"
#include "qat/ptq/sensitivity.hpp"
#include "qat/ptq/weighted_search.hpp"
#include "qat/train/compute.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

ptq::GptqOptions gptq_options(double damping, bool act_order, bool static_scales, int64_t block,
                              const std::string& scale, int64_t sweeps) {
  return {.damping = damping,
          .act_order = act_order,
          .static_scales = static_scales,
          .block = block,
          .scale = ptq::scale_source(scale),
          .sweeps = sweeps};
}

ptq::AwqOptions awq_options(int64_t steps, const std::string& scale, int64_t rows) {
  return {.steps = steps, .scale = ptq::scale_source(scale), .rows = rows};
}

/// A Python progress function as the library's; Ctrl-C is raised from it.
ptq::Progress progress_function(const py::object& progress) {
  return [progress](int64_t done, int64_t total, const std::string& tensor) {
    const py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done, total, tensor);
  };
}

ptq::CalibrationOptions calibration_options(int64_t batch, const py::object& progress,
                                            ptq::TokenWeights tokens = {}, ptq::LookupCurvatures lookups = {},
                                            ptq::OutputCurvatures outputs = {},
                                            double input_correction = 0.0) {
  return {.batch = batch,
          .tokens = std::move(tokens),
          .lookups = std::move(lookups),
          .outputs = std::move(outputs),
          .input_correction = input_correction,
          .progress = progress_function(progress)};
}

/// Runs `method` on a decoder without the GIL, in that compute dtype.
template <class Method>
auto run(PreparedDecoder& prepared, const std::string& compute_dtype, const Method& method) {
  const py::gil_scoped_release unlocked;
  const train::ComputeScope compute(train::compute_dtype(compute_dtype));
  return method(prepared.model, prepared.decoder->stages());
}

void bind_gptq(py::module_& module) {
  const ptq::GptqOptions defaults;
  const std::string scale(ptq::to_string(defaults.scale));
  module.def(
      "gptq_tensor",
      [](const at::Tensor& weight, const at::Tensor& hessian, const std::string& grid, double damping,
         bool act_order, bool static_scales, int64_t block, const std::string& source, int64_t sweeps,
         const std::optional<at::Tensor>& outputs, const std::string& tensor, bool seq) {
        ptq::GptqOptions options = gptq_options(damping, act_order, static_scales, block, source, sweeps);
        options.outputs = outputs.value_or(at::Tensor());
        options.seq = seq;
        const py::gil_scoped_release unlocked;
        ptq::Solution solution = ptq::gptq(weight, hessian, grid, options, tensor);
        return std::pair(std::move(solution.latent), std::move(solution.scales));
      },
      py::arg("weight"), py::arg("hessian"), py::arg("grid"), py::kw_only(),
      py::arg("damping") = defaults.damping, py::arg("act_order") = defaults.act_order,
      py::arg("static_scales") = defaults.static_scales, py::arg("block") = defaults.block,
      py::arg("scale") = scale, py::arg("sweeps") = defaults.sweeps, py::arg("outputs") = py::none(),
      py::arg("tensor") = "", py::arg("seq") = false,
      R"(Rounds a matrix so that its layer errs least on its own inputs (GPTQ, arXiv:2210.17323).

weight: float32[R, ...] of N weights a row; hessian: float32 or float64[N, N], E[x x^T] of the layer's inputs.
Returns (latent, scales): encoding `latent`, float32 in the weight's shape, with `scales`, float32[R, G, P], gives
the method's codes. scale: "reference", "search" or "weighted" (by the hessian's diagonal). act_order: columns
by falling diagonal; whole blocks of a grid with block scales, unless static_scales takes those from the weights
as they were. sweeps: of coordinate descent over codes and scales afterwards, in which the errors of rows count
together where outputs, float32[K, S, S] for groups of S rows, says how. seq: scales tied as the scale rule "seq"
ties them. NumericError for a hessian that is not positive definite with that damping.)");
  module.def(
      "apply_gptq",
      [](PreparedDecoder& prepared, const at::Tensor& windows, double damping, bool act_order,
         bool static_scales, int64_t block, const std::string& source, int64_t sweeps,
         ptq::TokenWeights tokens, ptq::LookupCurvatures lookups, ptq::OutputCurvatures outputs,
         double input_correction, int64_t batch, const std::string& compute_dtype,
         const py::object& progress) {
        const ptq::GptqOptions options =
            gptq_options(damping, act_order, static_scales, block, source, sweeps);
        const ptq::CalibrationOptions calibration = calibration_options(
            batch, progress, std::move(tokens), std::move(lookups), std::move(outputs), input_correction);
        return run(prepared, compute_dtype, [&](PreparedModel& model, const std::vector<Stage>& stages) {
          return ptq::apply_gptq(model, stages, windows, options, calibration);
        });
      },
      py::arg("prepared"), py::arg("windows"), py::kw_only(), py::arg("damping") = defaults.damping,
      py::arg("act_order") = defaults.act_order, py::arg("static_scales") = defaults.static_scales,
      py::arg("block") = defaults.block, py::arg("scale") = scale, py::arg("sweeps") = defaults.sweeps,
      py::arg("tokens") = ptq::TokenWeights(), py::arg("lookups") = ptq::LookupCurvatures(),
      py::arg("outputs") = ptq::OutputCurvatures(), py::arg("input_correction") = 0.0,
      py::arg("batch") = ptq::CalibrationOptions{}.batch, py::arg("compute_dtype") = "auto",
      py::arg("progress") = py::none(), "GPTQ on a prepared decoder; use `libqat.gptq`.");
}

void bind_seq(py::module_& module) {
  module.def(
      "seq_untie",
      [](const at::Tensor& scales, const std::string& grid, const std::string& tensor) {
        return ops::seq_untie(scales, grid, tensor);
      },
      py::arg("scales"), py::arg("grid"), py::arg("tensor") = "", py::call_guard<py::gil_scoped_release>(),
      "The free parameters float32[R, G, F] that `libqat.ops.seq_tie` takes to scales float32[R, G, P]. "
      "ArgumentError for scales that it cannot give.");
}

void bind_sensitivity(py::module_& module) {
  module.def(
      "sensitivity",
      [](PreparedDecoder& prepared, const at::Tensor& windows, int64_t seed, int64_t batch,
         const std::string& compute_dtype, const py::object& progress) {
        const ptq::Progress report = progress_function(progress);
        const auto logits = [&](const at::Tensor& tokens) { return prepared.decoder->forward(tokens); };
        const py::gil_scoped_release unlocked;
        const train::ComputeScope compute(train::compute_dtype(compute_dtype));
        ptq::Sensitivity found = ptq::sensitivity(prepared.model, logits, windows, seed, batch, report);
        return std::tuple(std::move(found.tokens), std::move(found.lookups), std::move(found.outputs));
      },
      py::arg("prepared"), py::arg("windows"), py::kw_only(), py::arg("seed") = 0, py::arg("batch") = 2,
      py::arg("compute_dtype") = "auto", py::arg("progress") = py::none(),
      R"(How much each token of a calibration text counts for each linear layer of a prepared decoder.

windows: int64[n, T]. Returns three dicts. The first: weight name -> float32[n, T] of mean 1, the mean over the layer's
outputs of their squared gradients, under the float model's cross-entropy with labels that it draws itself, clipped at
8 means. The second: name of a table that is also the head -> float64[N, N], the curvature of the place where its rows
are looked up, as it adds to E[s x x^T] of the head's inputs x. The third: weight name -> float32[K, S, S], the mean
product of the gradients at outputs k S .. k S + S - 1.)");
}

void bind_guided(py::module_& module) {
  const ptq::GuidedOptions defaults;
  module.def(
      "apply_guided",
      [](PreparedDecoder& prepared, const at::Tensor& windows, double damping, int64_t sweeps,
         const std::string& source, double correction, int64_t seed, int64_t batch,
         const std::string& compute_dtype, const py::object& progress) {
        ptq::GuidedOptions options;
        options.input_correction = correction;
        options.gptq.damping = damping;
        options.gptq.sweeps = sweeps;
        options.gptq.scale = ptq::scale_source(source);
        options.seed = seed;
        const ptq::CalibrationOptions calibration = calibration_options(batch, progress);
        const auto logits = [&](const at::Tensor& tokens) { return prepared.decoder->forward(tokens); };
        return run(prepared, compute_dtype, [&](PreparedModel& model, const std::vector<Stage>& stages) {
          return ptq::apply_guided(model, stages, logits, windows, options, calibration);
        });
      },
      py::arg("prepared"), py::arg("windows"), py::kw_only(), py::arg("damping") = defaults.gptq.damping,
      py::arg("sweeps") = defaults.gptq.sweeps,
      py::arg("scale") = std::string(ptq::to_string(defaults.gptq.scale)),
      py::arg("input_correction") = defaults.input_correction, py::arg("seed") = defaults.seed,
      py::arg("batch") = ptq::CalibrationOptions{}.batch, py::arg("compute_dtype") = "auto",
      py::arg("progress") = py::none(), "Guided rounding of a prepared decoder; use `libqat.guided`.");
}

void bind_weighted_search(py::module_& module) {
  module.def(
      "weighted_search_tensor",
      [](const at::Tensor& weight, const at::Tensor& importance, const std::string& grid,
         const std::string& tensor,
         bool seq) { return ptq::weighted_search(weight, importance, grid, tensor, seq); },
      py::arg("weight"), py::arg("importance"), py::arg("grid"), py::kw_only(), py::arg("tensor") = "",
      py::arg("seq") = false, py::call_guard<py::gil_scoped_release>(),
      "Scales float32[R, G, P] of least squared error, each weight counted by its column's importance[N]. "
      "seq: tied as the scale rule 'seq' ties them.");
  module.def(
      "apply_weighted_search",
      [](PreparedDecoder& prepared, const at::Tensor& windows, int64_t batch,
         const std::string& compute_dtype, const py::object& progress) {
        const ptq::CalibrationOptions calibration = calibration_options(batch, progress);
        return run(prepared, compute_dtype, [&](PreparedModel& model, const std::vector<Stage>& stages) {
          return ptq::apply_weighted_search(model, stages, windows, calibration);
        });
      },
      py::arg("prepared"), py::arg("windows"), py::kw_only(),
      py::arg("batch") = ptq::CalibrationOptions{}.batch, py::arg("compute_dtype") = "auto",
      py::arg("progress") = py::none(),
      "Weighted scale search on a prepared decoder; use `libqat.weighted_search`.");
}

void bind_awq(py::module_& module) {
  const ptq::AwqOptions defaults;
  const std::string scale(ptq::to_string(defaults.scale));
  module.def(
      "awq_scale",
      [](const std::vector<at::Tensor>& weights, const std::vector<std::string>& grids,
         const at::Tensor& hessian, const at::Tensor& magnitude, int64_t steps, const std::string& source,
         int64_t rows, const std::vector<int64_t>& producer_rows, const std::string& tensor) {
        const ptq::AwqOptions options = awq_options(steps, source, rows);
        const py::gil_scoped_release unlocked;
        const ptq::AwqScale found =
            ptq::awq_scale(weights, grids, hessian, magnitude, options, producer_rows, tensor);
        return std::tuple(found.scale, found.alpha, found.error);
      },
      py::arg("weights"), py::arg("grids"), py::arg("hessian"), py::arg("magnitude"), py::kw_only(),
      py::arg("steps") = defaults.steps, py::arg("scale") = scale, py::arg("rows") = defaults.rows,
      py::arg("producer_rows") = std::vector<int64_t>(), py::arg("tensor") = "",
      R"(AWQ's scale of input channels (arXiv:2306.00978) for weights that read the same input.

weights: float32[R, N] each, on `grids`; hessian: float[N, N], E[x x^T]; magnitude: float[N], E[|x|].
producer_rows: [N], inputs of the same row get the same scale. Returns (s float32[N], alpha, squared error of the
outputs over that without scaling). rows: measured of each weight, 0 for all.)");
  module.def(
      "apply_awq",
      [](PreparedDecoder& prepared, const at::Tensor& windows, int64_t steps, const std::string& source,
         int64_t rows, int64_t batch, const std::string& compute_dtype, const py::object& progress) {
        const ptq::AwqOptions options = awq_options(steps, source, rows);
        const ptq::CalibrationOptions calibration = calibration_options(batch, progress);
        return run(prepared, compute_dtype, [&](PreparedModel& model, const std::vector<Stage>& stages) {
          return ptq::apply_awq(model, stages, windows, options, calibration);
        });
      },
      py::arg("prepared"), py::arg("windows"), py::kw_only(), py::arg("steps") = defaults.steps,
      py::arg("scale") = scale, py::arg("rows") = defaults.rows,
      py::arg("batch") = ptq::CalibrationOptions{}.batch, py::arg("compute_dtype") = "auto",
      py::arg("progress") = py::none(), "AWQ on a prepared decoder; use `libqat.awq`.");
}

}  // namespace

void bind_ptq(py::module_& module) {
  bind_gptq(module);
  bind_seq(module);
  bind_sensitivity(module);
  bind_guided(module);
  bind_weighted_search(module);
  bind_awq(module);
}

}  // namespace qat::python
