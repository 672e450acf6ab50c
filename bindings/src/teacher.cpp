#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <memory>
#include <tuple>

#include "module.hpp"
#include "qat/train/cache_check.hpp"
#include "qat/train/objective.hpp"
#include "qat/train/pieces.hpp"
#include "qat/train/teacher_cache.hpp"
#include "training.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using train::CacheCheck;
using train::CachePlan;
using train::CacheProgress;
using train::TeacherCache;
using train::TokenData;
using Path = std::filesystem::path;

void bind_cache(py::module_& module) {
  using train::CacheCheck;
  using train::CachePlan;
  using train::CacheProgress;
  py::class_<CacheProgress>(module, "CacheProgress", "How far the building of a TeacherCache is.")
      .def_readonly("done", &CacheProgress::done, "Windows that are there.")
      .def_readonly("total", &CacheProgress::total, "Windows that the run needs.")
      .def_readonly("tokens_per_second", &CacheProgress::tokens_per_second, "Of what this call computed.")
      .def_readonly("seconds_left", &CacheProgress::seconds_left, "At that speed.");
  py::class_<CacheCheck>(module, "CacheCheck", "A cached teacher against the live one.")
      .def_readonly("tokens", &CacheCheck::tokens, "Predicted tokens compared.")
      .def_readonly("live", &CacheCheck::live, "KL to the teacher itself, nats.")
      .def_readonly("cached", &CacheCheck::cached, "KL to its cached answers: a lower bound.")
      .def_readonly("cosine", &CacheCheck::cosine, "Between the gradients by the hidden states.");
  py::class_<CachePlan>(module, "CachePlan",
                        R"(The answers that one run needs, and whose they are.

Args:
    data: TokenData.
    top_k: tokens per position whose log-probability is kept.
    teacher: `fingerprint` of the model that answers.
    **options: of the run, see `default_options()`.)")
      .def(py::init(
               [](const TokenData& data, int64_t top_k, std::uint64_t teacher, const py::kwargs& options) {
                 return train::plan_teacher_cache(data, options_of(options), top_k, teacher);
               }),
           py::arg("data"), py::arg("top_k"), py::arg("teacher"))
      .def_readonly("windows", &CachePlan::windows, "Of the text, ascending.")
      .def_property_readonly("bytes", &CachePlan::bytes, "Of a file that holds these answers and no others.");
  py::class_<TeacherCache>(module, "TeacherCache", "A teacher's top-k answers on disk, memory-mapped.")
      .def_static(
          "missing",
          [](const Path& path, const CachePlan& plan) { return TeacherCache::missing(path.string(), plan); },
          py::arg("path"), py::arg("plan"), py::call_guard<py::gil_scoped_release>(),
          "Windows of the plan that the file lacks. FileError for a file of another key or kind.")
      .def_static(
          "build",
          [](const Path& path, const CachePlan& plan, const py::object& teacher, const TokenData& data,
             const py::object& progress, const py::kwargs& options) {
            const train::LanguageModel model = language_model(teacher, "TeacherCache.build: teacher");
            const train::Options settings = options_of(options);
            Reporter reporter(progress);
            bool complete = false;
            {
              const py::gil_scoped_release unlocked;
              complete = TeacherCache::build(path.string(), plan, model, data, settings,
                                             [&](const CacheProgress& now) { return reporter(now); });
            }
            reporter.rethrow();
            return complete;
          },
          py::arg("path"), py::arg("plan"), py::arg("teacher"), py::arg("data"),
          py::arg("progress") = py::none(),
          R"(Computes what is missing. True when the plan is complete, False when `progress` returned False.

What was computed stays, also after Ctrl-C or a kill; building again goes on from there.)")
      .def_static(
          "open",
          [](const Path& path, const CachePlan& plan) { return TeacherCache::open(path.string(), plan); },
          py::arg("path"), py::arg("plan"), py::call_guard<py::gil_scoped_release>(),
          "Maps the file. FileError when it is malformed, another's, or lacks windows of the plan.")
      .def(
          "answer",
          [](const TeacherCache& cache, const std::vector<int64_t>& windows) {
            const train::TeacherAnswer answer = cache.answer(windows);
            return std::make_tuple(answer.ids, answer.log_p);
          },
          py::arg("windows"),
          "(ids int64[B, T - 1, k], log_p float32[B, T - 1, k + 1]) of windows of the text.")
      .def(
          "check",
          [](const TeacherCache& cache, PreparedDecoder& student, const py::object& teacher,
             const TokenData& data, int64_t batches, const py::kwargs& options) {
            const train::LanguageModel model = language_model(teacher, "TeacherCache.check: teacher");
            const train::Options settings = options_of(options);
            const py::gil_scoped_release unlocked;
            return train::check_teacher_cache(student.model, train::in_halves(student.decoder), model, cache,
                                              data, settings, batches);
          },
          py::arg("student"), py::arg("teacher"), py::arg("data"), py::arg("batches") = 2,
          "A CacheCheck: the loss of the run's first batches with the live teacher and with this cache.");
  module.def(
      "fingerprint",
      [](const models::Decoder& decoder, const std::string& also) {
        return train::fingerprint(decoder, also);
      },
      py::arg("decoder"), py::arg("also") = "", py::call_guard<py::gil_scoped_release>(),
      "64-bit hash of all weights, and of what else decides a model's answers.");
}

/// The head that Python describes by its weight and grid.
Head head_of(const at::Tensor& weight, const std::optional<at::Tensor>& bias, const std::string& grid,
             const Estimator& estimator) {
  Head head{weight, bias.value_or(at::Tensor())};
  if (grid != "f32") {
    head.quantizer = std::make_shared<Quantizer>("head.weight", Scheme{grid}, estimator);
  }
  return head;
}

at::Tensor python_head_loss(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens,
                            const std::optional<at::Tensor>& bias, const std::string& grid,
                            const std::string& estimator, const std::string& scale,
                            const std::optional<std::tuple<at::Tensor, at::Tensor>>& teacher, double kl,
                            double ce, double temperature, double reverse_kl, double jsd, double jsd_alpha,
                            double cakld, double cakld_beta, int64_t chunk) {
  train::TeacherAnswer answer;
  if (teacher) answer = {std::get<0>(*teacher), Head{std::get<1>(*teacher)}};
  return train::head_loss(hidden, head_of(weight, bias, grid, {estimator_kind(estimator), scale_rule(scale)}),
                          answer, tokens,
                          {kl, ce, temperature, reverse_kl, jsd, jsd_alpha, cakld, cakld_beta}, chunk);
}

void bind_losses(py::module_& module) {
  const train::Objective defaults;
  module.def(
      "objective_loss",
      [](const at::Tensor& student, const std::optional<at::Tensor>& teacher, const at::Tensor& tokens,
         double kl, double ce, double temperature, double reverse_kl, double jsd, double jsd_alpha,
         double cakld, double cakld_beta) {
        return train::objective_loss(student, teacher.value_or(at::Tensor()), tokens,
                                     {kl, ce, temperature, reverse_kl, jsd, jsd_alpha, cakld, cakld_beta});
      },
      py::arg("student"), py::arg("teacher"), py::arg("tokens"), py::kw_only(), py::arg("kl") = defaults.kl,
      py::arg("ce") = defaults.ce, py::arg("temperature") = defaults.temperature,
      py::arg("reverse_kl") = defaults.reverse_kl, py::arg("jsd") = defaults.jsd,
      py::arg("jsd_alpha") = defaults.jsd_alpha, py::arg("cakld") = defaults.cakld,
      py::arg("cakld_beta") = defaults.cakld_beta, py::call_guard<py::gil_scoped_release>(),
      R"(The trainer's loss, differentiable, for loops of your own: a scalar over predicted positions.

Args:
    student: float logits [B, T, V]; its gradient is computed in the forward pass, without a float32 copy of the logits.
    teacher: float logits [B, T, V], constant, or None when no term needs it.
    tokens: int64[B, T], T >= 2.
    kl: weight of temperature^2 * KL(teacher || student) at `temperature`.
    ce: weight of the cross-entropy with the next token.
    reverse_kl: weight of temperature^2 * KL(student || teacher).
    jsd: weight of the divergence from the mix jsd_alpha * teacher + (1 - jsd_alpha) * student.
    cakld: weight of cakld_beta * reverse + (1 - cakld_beta) * forward KL; a cakld_beta of -1 is the teacher's mean probability of the next tokens.)");
  module.def(
      "loss_rows", &train::piece_height, py::arg("chunk"), py::arg("rows"), py::arg("vocabulary"),
      "Rows of logits that `head_loss` makes at a time, for `rows` predicted positions; chunk: its own.");
  module.def("head_loss", &python_head_loss, py::arg("hidden"), py::arg("weight"), py::arg("tokens"),
             py::kw_only(), py::arg("bias") = py::none(), py::arg("grid") = "f32",
             py::arg("estimator") = "ste", py::arg("scale") = "reference", py::arg("teacher") = py::none(),
             py::arg("kl") = defaults.kl, py::arg("ce") = defaults.ce,
             py::arg("temperature") = defaults.temperature, py::arg("reverse_kl") = defaults.reverse_kl,
             py::arg("jsd") = defaults.jsd, py::arg("jsd_alpha") = defaults.jsd_alpha,
             py::arg("cakld") = defaults.cakld, py::arg("cakld_beta") = defaults.cakld_beta,
             py::arg("chunk") = 0, py::call_guard<py::gil_scoped_release>(),
             R"(objective_loss of the logits hidden @ W_hat^T + bias, which never exist in full.

Args:
    hidden: float [B, T, h], what goes into the head.
    weight: float [V, h], the head's latent; `grid`, `estimator` and `scale` say how it is quantized.
    tokens: int64[B, T], T >= 2.
    teacher: (hidden [B, T, h'], weight [V, h']), constant, or None when no term needs it.
    chunk: positions whose logits exist at a time; 0 = equal pieces of at most 2^24 logits.

The terms of the loss are those of `objective_loss`. The gradients of hidden, weight and bias are formed in the forward pass.)");
}

}  // namespace

train::Options options_of(const py::dict& options) {
  const py::object dumps = py::module_::import("json").attr("dumps");
  return train::options_from_json(dumps(options).cast<std::string>());
}

/// A Decoder in halves, any other callable by its logits, None as no model.
train::LanguageModel language_model(const py::object& model, const std::string& argument) {
  if (model.is_none()) return {};
  if (py::isinstance<models::Decoder>(model)) {
    return train::in_halves(model.cast<std::shared_ptr<models::Decoder>>());
  }
  return logits_function(model, argument);
}

void bind_teacher(py::module_& module) {
  bind_cache(module);
  bind_losses(module);
}

}  // namespace qat::python
