#include "qat/eval/choices.hpp"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <utility>

#include "callables.hpp"
#include "module.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

eval::SplitModel split_model(const py::object& model) {
  if (py::isinstance<models::Decoder>(model)) {
    const auto decoder = model.cast<std::shared_ptr<models::Decoder>>();
    return {[decoder](const at::Tensor& tokens) { return decoder->hidden(tokens); },
            [decoder](const at::Tensor& hidden) { return decoder->head(hidden); }};
  }
  if (py::isinstance<PreparedDecoder>(model)) {
    const auto prepared = model.cast<std::shared_ptr<PreparedDecoder>>();
    return {[prepared](const at::Tensor& tokens) {
              const auto scope = prepared->model.quantized();
              return prepared->decoder->hidden(tokens);
            },
            [prepared](const at::Tensor& hidden) {
              const auto scope = prepared->model.quantized();
              return prepared->decoder->head(hidden);
            }};
  }
  return eval::SplitModel::whole(logits_function(model, "score_choices: model"));
}

eval::ChoiceOptions options_of(int64_t max_length, int64_t batch_tokens, const py::object& progress) {
  eval::ChoiceOptions options;
  options.max_length = max_length;
  options.batch_tokens = batch_tokens;
  options.progress = [progress](int64_t done, int64_t total) {
    const py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done, total);
  };
  return options;
}

/// (tokens, context)
using Pair = std::pair<std::vector<int64_t>, int64_t>;
/// (choices, bytes, answer)
using Asked = std::tuple<std::vector<Pair>, std::vector<int64_t>, int64_t>;

std::vector<eval::Continuation> continuations_of(const std::vector<Pair>& pairs) {
  std::vector<eval::Continuation> result;
  for (const auto& [tokens, context] : pairs) result.push_back({tokens, context});
  return result;
}

std::vector<double> log_likelihoods(const py::object& model, const std::vector<Pair>& continuations,
                                    int64_t max_length, int64_t batch_tokens, const py::object& progress) {
  const eval::SplitModel split = split_model(model);
  const eval::ChoiceOptions options = options_of(max_length, batch_tokens, progress);
  const py::gil_scoped_release unlocked;
  return eval::log_likelihoods(split, continuations_of(continuations), options);
}

eval::ChoiceScore score_choices(const py::object& model, const std::vector<Asked>& questions,
                                int64_t max_length, int64_t batch_tokens, const py::object& progress) {
  const eval::SplitModel split = split_model(model);
  const eval::ChoiceOptions options = options_of(max_length, batch_tokens, progress);
  const py::gil_scoped_release unlocked;
  std::vector<eval::Question> asked;
  for (const auto& [choices, bytes, answer] : questions) {
    asked.push_back({continuations_of(choices), bytes, answer});
  }
  return eval::score_choices(split, asked, options);
}

}  // namespace

void bind_choices(py::module_& module) {
  using eval::ChoiceScore;
  py::class_<ChoiceScore>(module, "ChoiceScore", "What one model chose in a multiple-choice test.")
      .def_readonly("log_likelihoods", &ChoiceScore::log_likelihoods, "[question][choice], nats.")
      .def_readonly("chosen", &ChoiceScore::chosen, "Per question: index of the greatest log-likelihood.")
      .def_readonly("chosen_per_byte", &ChoiceScore::chosen_per_byte,
                    "The same after division by the choice's bytes.")
      .def_readonly("accuracy", &ChoiceScore::accuracy, "Share of `chosen` that are the answer.")
      .def_readonly("accuracy_norm", &ChoiceScore::accuracy_norm, "The same for `chosen_per_byte`.");
  const eval::ChoiceOptions defaults;
  const auto max_length = py::arg("max_length") = defaults.max_length;
  const auto batch_tokens = py::arg("batch_tokens") = defaults.batch_tokens;
  const auto progress = py::arg("progress") = py::none();
  module.def("log_likelihoods", &log_likelihoods, py::arg("model"), py::arg("continuations"), py::kw_only(),
             max_length, batch_tokens, progress,
             R"(log p(continuation | context), nats, of token ids.

Args:
    model: a Decoder, a PreparedDecoder (with its quantized weights), or any function int64[B, T] -> float
        logits [B, T, V] of a causal model. For decoders logits exist only at scored positions.
    continuations: (tokens, context) pairs: the first `context` tokens are given, the others scored.
    max_length: longest input; longer contexts lose their beginning.
    batch_tokens: B * T of a call at most, padding included; a single long row may exceed it.
    progress: called with continuations done and in all.

ArgumentError for an empty context or continuation, for ids out of range, and for logits of another shape.)");
  module.def("score_choices", &score_choices, py::arg("model"), py::arg("questions"), py::kw_only(),
             max_length, batch_tokens, progress,
             R"(A ChoiceScore of token ids; `libqat.compare_choices` takes text.

Args:
    model, max_length, batch_tokens, progress: as `log_likelihoods`.
    questions: (choices, bytes, answer) each: the choices as (tokens, context) pairs, the UTF-8 length of each
        choice's text, and the index of the right one.)");
}

}  // namespace qat::python
