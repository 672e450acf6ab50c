#include "qat/eval/bootstrap.hpp"

#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>

#include "module.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using Series = std::vector<double>;

eval::BootstrapOptions options_of(int64_t resamples, uint64_t seed) {
  eval::BootstrapOptions options;
  options.resamples = resamples;
  options.seed = seed;
  return options;
}

py::tuple as_tuple(const eval::Interval& interval) {
  return py::make_tuple(interval.low, interval.high);
}

at::Tensor resampled_means(const std::vector<Series>& series, const std::optional<Series>& weights,
                           int64_t resamples, uint64_t seed) {
  const auto means = eval::resampled_means(series, weights.value_or(Series()), options_of(resamples, seed));
  at::Tensor result = at::empty({static_cast<int64_t>(means.size()), resamples}, at::kDouble);
  double* out = result.mutable_data_ptr<double>();
  for (const Series& samples : means) out = std::copy(samples.begin(), samples.end(), out);
  return result;
}

py::tuple mean_interval(const Series& values, const std::optional<Series>& weights, int64_t resamples,
                        uint64_t seed) {
  return as_tuple(eval::mean_interval(values, weights.value_or(Series()), options_of(resamples, seed)));
}

py::list score_intervals(const std::vector<eval::Score>& scores, int64_t resamples, uint64_t seed) {
  py::list result;
  for (const eval::ScoreIntervals& one : eval::intervals(scores, options_of(resamples, seed))) {
    py::dict entry;
    entry["ppl"] = as_tuple(one.perplexity);
    entry["nll"] = as_tuple(one.nll);
    entry["kl"] = as_tuple(one.kl);
    entry["top1"] = as_tuple(one.top1);
    result.append(entry);
  }
  return result;
}

py::dict removed(const eval::Score& reference, const eval::Score& quantized, const eval::Score& trained,
                 int64_t resamples, uint64_t seed) {
  const eval::Removed shares = eval::removed(reference, quantized, trained, options_of(resamples, seed));
  py::dict result;
  result["kl"] = shares.kl;
  result["kl_interval"] = as_tuple(shares.kl_interval);
  result["nll"] = shares.nll;
  result["nll_interval"] = as_tuple(shares.nll_interval);
  return result;
}

}  // namespace

void bind_bootstrap(py::module_& module) {
  const eval::BootstrapOptions defaults;
  const auto resamples = py::arg("resamples") = defaults.resamples;
  const auto seed = py::arg("seed") = defaults.seed;
  module.def(
      "resampled_means", &resampled_means, py::arg("series"), py::arg("weights") = py::none(), py::kw_only(),
      resamples, seed,
      R"(Paired bootstrap: weighted means of several series over the same items, for statistics of your own.

Args:
    series: S sequences of n values; item i of each belongs to the same window, question or image.
    weights: n positive numbers, by default all 1.
    resamples: how often n items are drawn with replacement, the same ones for each series.
    seed: the same seed gives the same draws on each machine.

Returns float64 [S, resamples].)");
  module.def(
      "mean_interval", &mean_interval, py::arg("values"), py::arg("weights") = py::none(), py::kw_only(),
      resamples, seed,
      R"((low, high): the 95 % percentile bootstrap interval of a weighted mean; NaN for a single value.

For the difference of two models pass the differences of their values, item by item.)");
  module.def("score_intervals", &score_intervals, py::arg("scores"), py::kw_only(), resamples, seed,
             R"({"ppl", "nll", "kl", "top1": (low, high)} per Score of one `compare`.

95 % bootstrap intervals over windows weighted by their tokens; NaN for a text of a single window.)");
  module.def(
      "removed", &removed, py::arg("reference"), py::arg("quantized"), py::arg("trained"), py::kw_only(),
      resamples, seed,
      R"({"kl", "kl_interval", "nll", "nll_interval"}: shares of the cost of quantization that training removed.

1 - cost(trained) / cost(quantized), for the KL and for the loss above the reference's, from three Scores of
one `compare`. Numerator and denominator share their resampled windows. An interval is NaN when the quantized
model's cost is not positive in every resample.)");
}

}  // namespace qat::python
