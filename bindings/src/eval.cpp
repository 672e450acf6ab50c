#include "qat/eval/eval.hpp"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "callables.hpp"
#include "module.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using Progress = std::function<bool(int64_t done, int64_t total)>;

/// A Python progress function as the library's: returning False stops, and so does Ctrl-C.
Progress progress_function(const py::object& progress) {
  return [progress](int64_t done, int64_t total) {
    const py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress.is_none()) return true;
    return !progress(done, total).is(py::handle(Py_False));
  };
}

std::vector<eval::Score> compare(const py::object& reference, const std::vector<py::object>& candidates,
                                 const at::Tensor& tokens, int64_t window, int64_t batch,
                                 const py::object& progress) {
  const eval::LogitsFunction first = logits_function(reference, "compare: reference");
  std::vector<eval::LogitsFunction> others;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    others.push_back(logits_function(candidates[i], "compare: candidates[" + std::to_string(i) + "]"));
  }
  eval::Options options;
  options.window = window;
  options.batch = batch;
  options.progress = progress_function(progress);
  const py::gil_scoped_release unlocked;
  return eval::compare(first, others, tokens, options);
}

std::string describe(const eval::Score& score) {
  return py::str("Score(tokens={}, perplexity={:.4f}, kl={:.5f}, top1={:.4f})")
      .format(score.tokens, score.perplexity(), score.kl, score.top1)
      .cast<std::string>();
}

}  // namespace

void bind_eval(py::module_& module) {
  py::class_<eval::Score>(module, "Score", "Means over the predicted tokens of a text.")
      .def_readonly("tokens", &eval::Score::tokens, "Predicted tokens.")
      .def_readonly("nll", &eval::Score::nll, "Negative log-likelihood, nats per token.")
      .def_property_readonly("perplexity", &eval::Score::perplexity, "exp(nll).")
      .def_readonly("kl", &eval::Score::kl, "KL(reference || candidate), nats per token.")
      .def_readonly("top1", &eval::Score::top1, "Share of positions whose argmax equals the reference's.")
      .def_readonly("window_nll", &eval::Score::window_nll, "Mean of each window, for intervals.")
      .def_readonly("window_kl", &eval::Score::window_kl, "Mean of each window, for intervals.")
      .def_readonly("window_top1", &eval::Score::window_top1, "Mean of each window, for intervals.")
      .def_readonly("window_tokens", &eval::Score::window_tokens, "Predicted tokens of each window.")
      .def("__repr__", &describe);
  module.def(
      "compare", &compare, py::arg("reference"), py::arg("candidates"), py::arg("tokens"), py::kw_only(),
      py::arg("window") = eval::Options{}.window, py::arg("batch") = eval::Options{}.batch,
      py::arg("progress") = py::none(),
      R"(Scores of a reference model (its own kl 0, top1 1) and of candidates, on the same text in one pass.

Args:
    reference, candidates: a Decoder, a PreparedDecoder (scored with its quantized weights), or any function
        int64[B, T] -> float logits [B, T, V]. Decoders run without the GIL. Under torch.autocast they compute in its
        dtype; log-probabilities are float32 and sums float64 always.
    tokens: int64[n], n >= 2, cut into windows; each predicts its tokens but the first. The shorter rest counts too.
    window: tokens per window.
    batch: windows per call.
    progress: called with (predicted tokens done, in all) after each batch; returning False stops early.

Returns 1 + len(candidates) scores, the reference's first. ArgumentError for bad tokens and for logits of another
shape.)");
  module.def("share_removed", &eval::share_removed, py::arg("quantized"), py::arg("trained"),
             "Share of a quantization loss that training won back: 1 - trained / quantized; NaN when "
             "`quantized` is not positive.");
}

}  // namespace qat::python
