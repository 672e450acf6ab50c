#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <optional>

#include "callables.hpp"
#include "module.hpp"
#include "qat/core/error.hpp"
#include "qat/train/compute.hpp"
#include "qat/train/objective.hpp"
#include "qat/train/trainer.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using train::Outcome;
using train::StepReport;
using train::TokenData;
using train::Trainer;
using Path = std::filesystem::path;

train::Options options_of(const py::dict& options) {
  const py::object dumps = py::module_::import("json").attr("dumps");
  return train::options_from_json(dumps(options).cast<std::string>());
}

py::object as_python(const std::string& json) {
  return py::module_::import("json").attr("loads")(json);
}

/// A Decoder in halves, any other callable by its logits, None as no model.
train::LanguageModel language_model(const py::object& model, const std::string& argument) {
  if (model.is_none()) return {};
  if (py::isinstance<models::Decoder>(model)) {
    return train::in_halves(model.cast<std::shared_ptr<models::Decoder>>());
  }
  return logits_function(model, argument);
}

/// A trainer and what it borrows.
class PythonTrainer {
 public:
  PythonTrainer(std::shared_ptr<PreparedDecoder> student, const py::object& teacher, TokenData data,
                const Path& run_folder, const py::dict& options)
      : student_(std::move(student)),
        trainer_(student_->model, train::in_halves(student_->decoder),
                 language_model(teacher, "Trainer: teacher"), std::move(data), options_of(options),
                 run_folder.string()) {}

  /// True when finished. A Python exception from `progress`, or from Ctrl-C, is raised after the state is
  /// saved.
  bool run(const py::object& progress) {
    std::optional<py::error_already_set> pending;
    trainer_.set_progress([&](const StepReport& report) {
      const py::gil_scoped_acquire locked;
      try {
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (progress.is_none()) return true;
        return !progress(report).is(py::handle(Py_False));
      } catch (py::error_already_set& error) {
        pending = std::move(error);
        return false;
      }
    });
    Outcome outcome;
    {
      const py::gil_scoped_release unlocked;
      outcome = trainer_.run();
    }
    trainer_.set_progress(nullptr);
    if (pending) throw std::move(*pending);
    return outcome == Outcome::kFinished;
  }

  void set_evaluation(const at::Tensor& tokens, int64_t window, int64_t batch) {
    eval::Options options;
    options.window = window;
    options.batch = batch;
    trainer_.set_evaluation(tokens, options);
  }

  Trainer& trainer() noexcept { return trainer_; }

 private:
  std::shared_ptr<PreparedDecoder> student_;
  Trainer trainer_;
};

void bind_data(py::module_& module) {
  py::class_<TokenData>(module, "TokenData", "A tokenised text, memory-mapped or in memory.")
      .def_static(
          "open", [](const Path& path) { return TokenData::open(path.string()); }, py::arg("path"),
          "Maps a *.tokens file. FileError naming what is malformed, or the position of an id beyond the "
          "vocabulary.")
      .def_static("from_tensor", &TokenData::from_tensor, py::arg("tokens"), py::arg("vocabulary"),
                  "tokens: int64[n], ids in [0, vocabulary). Copies.")
      .def("__len__", &TokenData::size)
      .def_property_readonly("vocabulary", &TokenData::vocabulary, "Ids are below it.")
      .def_property_readonly("fingerprint", &TokenData::fingerprint, "64-bit hash of vocabulary and ids.")
      .def("tokens", &TokenData::tokens, "All tokens, int64[n].")
      .def("batch", &TokenData::batch, py::arg("index"), py::arg("batch_size"), py::arg("length"),
           py::arg("seed") = 0,
           "The index-th micro-batch of a run, int64[batch_size, length]: windows without replacement within "
           "an "
           "epoch, in an order that `seed` and the epoch decide.");
  module.def(
      "write_tokens",
      [](const Path& path, const at::Tensor& tokens, int64_t vocabulary) {
        train::write_tokens(path.string(), tokens, vocabulary);
      },
      py::arg("path"), py::arg("tokens"), py::arg("vocabulary"),
      "Writes a *.tokens file; it appears whole or not at all. tokens: int64[n], ids in [0, vocabulary).");
}

void bind_report(py::module_& module) {
  py::class_<StepReport>(module, "StepReport", "What one training step did; -1 where nothing was measured.")
      .def_readonly("step", &StepReport::step, "1-based.")
      .def_readonly("steps", &StepReport::steps, "In all.")
      .def_readonly("loss", &StepReport::loss, "Mean over the step's predicted tokens, nats.")
      .def_readonly("learning_rate", &StepReport::learning_rate, "Of this step.")
      .def_readonly("gradient_norm", &StepReport::gradient_norm, "Global, before clipping.")
      .def_readonly("tokens_per_second", &StepReport::tokens_per_second, "Since `run` began.")
      .def_readonly("seconds_left", &StepReport::seconds_left, "Until the last step, at the present speed.")
      .def_readonly("flip_rate", &StepReport::flip_rate,
                    "Share of trained codes that differ from the last measurement.")
      .def_readonly("distance_to_grid", &StepReport::distance_to_grid,
                    "RMS(w_hat - w) / RMS(w) of the trained quantized weights.")
      .def_readonly("evaluation", &StepReport::evaluation,
                    "Scores of teacher (if any) and student, or nothing when not evaluated.")
      .def(
          "to_json", [](const StepReport& report) { return train::to_json(report); },
          "The line of telemetry.jsonl.");
}

/// The head that Python describes by its weight and grid.
Head head_of(const at::Tensor& weight, const std::optional<at::Tensor>& bias, const std::string& grid,
             const std::string& estimator) {
  Head head{weight, bias.value_or(at::Tensor())};
  if (grid != "f32") {
    head.quantizer =
        std::make_shared<Quantizer>("head.weight", Scheme{grid}, Estimator{estimator_kind(estimator)});
  }
  return head;
}

at::Tensor python_head_loss(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens,
                            const std::optional<at::Tensor>& bias, const std::string& grid,
                            const std::string& estimator,
                            const std::optional<std::tuple<at::Tensor, at::Tensor>>& teacher, double kl,
                            double ce, double temperature, int64_t chunk) {
  train::TeacherAnswer answer;
  if (teacher) answer = {std::get<0>(*teacher), Head{std::get<1>(*teacher)}};
  return train::head_loss(hidden, head_of(weight, bias, grid, estimator), answer, tokens,
                          {kl, ce, temperature}, chunk);
}

void bind_losses(py::module_& module) {
  const train::Objective defaults;
  module.def(
      "objective_loss",
      [](const at::Tensor& student, const std::optional<at::Tensor>& teacher, const at::Tensor& tokens,
         double kl, double ce, double temperature) {
        return train::objective_loss(student, teacher.value_or(at::Tensor()), tokens, {kl, ce, temperature});
      },
      py::arg("student"), py::arg("teacher"), py::arg("tokens"), py::kw_only(), py::arg("kl") = defaults.kl,
      py::arg("ce") = defaults.ce, py::arg("temperature") = defaults.temperature,
      py::call_guard<py::gil_scoped_release>(),
      R"(The trainer's loss, differentiable, for loops of your own: a scalar over predicted positions.

Args:
    student: float logits [B, T, V]; its gradient is computed in the forward pass, without a float32 copy of the logits.
    teacher: float logits [B, T, V], constant, or None when kl is 0.
    tokens: int64[B, T], T >= 2.
    kl: weight of temperature^2 * KL(teacher || student) at `temperature`.
    ce: weight of the cross-entropy with the next token.)");
  module.def("head_loss", &python_head_loss, py::arg("hidden"), py::arg("weight"), py::arg("tokens"),
             py::kw_only(), py::arg("bias") = py::none(), py::arg("grid") = "f32",
             py::arg("estimator") = "ste", py::arg("teacher") = py::none(), py::arg("kl") = defaults.kl,
             py::arg("ce") = defaults.ce, py::arg("temperature") = defaults.temperature, py::arg("chunk") = 0,
             py::call_guard<py::gil_scoped_release>(),
             R"(objective_loss of the logits hidden @ W_hat^T + bias, which never exist in full.

Args:
    hidden: float [B, T, h], what goes into the head.
    weight: float [V, h], the head's latent; `grid` and `estimator` say how it is quantized.
    tokens: int64[B, T], T >= 2.
    teacher: (hidden [B, T, h'], weight [V, h']), constant, or None when kl is 0.
    chunk: positions whose logits exist at a time; 0 = as many as make 2^23 logits.

The gradients of hidden, weight and bias are formed in the forward pass.)");
}

void bind_trainer(py::module_& module) {
  py::class_<PythonTrainer>(module, "Trainer",
                            R"(Trains a PreparedDecoder on token data, resumable bit for bit.

Args:
    student: a PreparedDecoder; its parameters are trained in place.
    teacher: a Decoder or a function int64[B, T] -> logits; None when objective["kl"] is 0. A cheap one is
        `decoder.frozen_copy(torch.bfloat16)`, made before training.
    data: TokenData.
    run_folder: holds run.json, state.safetensors and telemetry.jsonl; "" keeps everything in memory.
    **options: see `default_options()`, for example steps=100, learning_rate=1e-4,
        objective={"kl": 0.5, "ce": 0.5}, frozen=["model\\.embed_tokens"].

ArgumentError naming the option, or what does not fit together.)")
      .def(py::init([](std::shared_ptr<PreparedDecoder> student, const py::object& teacher, TokenData data,
                       const Path& run_folder, const py::kwargs& options) {
             return std::make_unique<PythonTrainer>(std::move(student), teacher, std::move(data), run_folder,
                                                    options);
           }),
           py::arg("student"), py::arg("teacher"), py::arg("data"), py::arg("run_folder") = "")
      .def(
          "resume", [](PythonTrainer& self) { self.trainer().resume(); },
          py::call_guard<py::gil_scoped_release>(),
          "Continues from the run folder's state. FileError when there is none or it is another run's.")
      .def("set_evaluation", &PythonTrainer::set_evaluation, py::arg("tokens"), py::kw_only(),
           py::arg("window") = eval::Options{}.window, py::arg("batch") = eval::Options{}.batch,
           "Held-out tokens int64[n], scored every `eval_every` steps; see `compare`.")
      .def("run", &PythonTrainer::run, py::arg("progress") = py::none(),
           R"(Trains to `steps`. True when finished, False when stopped.

progress: called with a StepReport after each step; returning False stops. On Ctrl-C, or when progress raises, the
state is saved and the exception raised. NumericError naming the step for a loss that is not finite.)")
      .def(
          "request_stop", [](PythonTrainer& self) { self.trainer().request_stop(); },
          "Ends `run` after the step under way, from any thread; the state is saved.")
      .def_property_readonly(
          "step", [](PythonTrainer& self) { return self.trainer().step(); }, "Optimizer steps done.");
}

}  // namespace

void bind_train(py::module_& module) {
  bind_data(module);
  bind_report(module);
  bind_trainer(module);
  bind_losses(module);
  module.def(
      "default_options", [] { return as_python(train::to_json(train::Options{})); },
      "Every option of `Trainer` with its default, as a dict.");
  module.def(
      "check_options",
      [](const py::kwargs& options) { return as_python(train::to_json(options_of(options))); },
      "The options completed by the defaults. ArgumentError naming an unknown or illegal one.");
  module.def(
      "compute_dtype",
      [](const std::string& name) {
        return train::compute_dtype(name) == at::kBFloat16 ? "bfloat16" : "float32";
      },
      py::arg("name") = "auto",
      "'float32' or 'bfloat16': what the option compute_dtype means on this CPU. Best for a teacher, too.");
  module.def(
      "learning_rate_at",
      [](int64_t step, const py::kwargs& options) { return learning_rate_at(options_of(options), step); },
      py::arg("step"), "The learning rate of step 1, 2, ... under the given options.");
}

}  // namespace qat::python
