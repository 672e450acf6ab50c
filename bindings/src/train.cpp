#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <optional>

#include "module.hpp"
#include "qat/train/compute.hpp"
#include "qat/train/trainer.hpp"
#include "training.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using train::Outcome;
using train::StepReport;
using train::TeacherCache;
using train::TokenData;
using train::Trainer;
using Path = std::filesystem::path;

py::object as_python(const std::string& json) {
  return py::module_::import("json").attr("loads")(json);
}

/// A trainer and what it borrows.
class PythonTrainer {
 public:
  PythonTrainer(std::shared_ptr<PreparedDecoder> student, const TeacherCache& teacher, TokenData data,
                const Path& run_folder, const py::dict& options)
      : student_(std::move(student)),
        trainer_(student_->model, train::in_halves(student_->decoder), teacher, std::move(data),
                 options_of(options), run_folder.string()) {}
  PythonTrainer(std::shared_ptr<PreparedDecoder> student, const py::object& teacher, TokenData data,
                const Path& run_folder, const py::dict& options)
      : student_(std::move(student)),
        trainer_(student_->model, train::in_halves(student_->decoder),
                 language_model(teacher, "Trainer: teacher"), std::move(data), options_of(options),
                 run_folder.string()) {}

  /// True when finished. A Python exception from `progress`, or from Ctrl-C, is raised after the state is
  /// saved.
  bool run(const py::object& progress) {
    Reporter reporter(progress);
    trainer_.set_progress([&](const StepReport& report) { return reporter(report); });
    Outcome outcome;
    {
      const py::gil_scoped_release unlocked;
      outcome = trainer_.run();
    }
    trainer_.set_progress(nullptr);
    reporter.rethrow();
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
      .def("windows", &TokenData::windows, py::arg("index"), py::arg("batch_size"), py::arg("length"),
           py::arg("seed") = 0, "The windows of the text that make up `batch` of the same arguments.")
      .def("first_windows", &TokenData::first_windows, py::arg("batches"), py::arg("batch_size"),
           py::arg("length"), py::arg("seed") = 0, py::kw_only(), py::arg("most"),
           "The windows that the first `batches` micro-batches read, each once, in their order; at most "
           "`most`.")
      .def("read", &TokenData::read, py::arg("windows"), py::arg("length"),
           "Windows of the text, int64[n, length].")
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
      .def_readonly("oscillation", &StepReport::oscillation,
                    "Share of codes that also changed the other way than the last time.")
      .def_readonly("clip_rate", &StepReport::clip_rate, "Share of weights beyond the range of their scale.")
      .def_readonly("scale_drift", &StepReport::scale_drift,
                    "RMS change of the scales since the start, in units of their field's mean.")
      .def_readonly("distance_to_grid", &StepReport::distance_to_grid,
                    "RMS(w_hat - w) / RMS(w) of the trained quantized weights.")
      .def_readonly("dead_codes", &StepReport::dead_codes,
                    "Grid -> share of its codes that no weight of a tensor has; {} when not measured.")
      .def_readonly(
          "probe_kl", &StepReport::probe_kl,
          "KL to the teacher, of what would ship, on the first batch that the run does not train on.")
      .def_readonly("probe_kl_start", &StepReport::probe_kl_start, "The same before the first step.")
      .def_readonly("evaluation", &StepReport::evaluation,
                    "Scores of teacher (if any) and student, or nothing when not evaluated.")
      .def(
          "to_json", [](const StepReport& report) { return train::to_json(report); },
          "The line of telemetry.jsonl.");
}

void bind_trainer(py::module_& module) {
  py::class_<PythonTrainer>(module, "Trainer",
                            R"(Trains a PreparedDecoder on token data, resumable bit for bit.

Args:
    student: a PreparedDecoder; its parameters are trained in place.
    teacher: a Decoder or a function int64[B, T] -> logits; None when the objective needs none. A cheap one is
        `decoder.frozen_copy(torch.bfloat16)`, made before training. Or a TeacherCache.
    data: TokenData.
    run_folder: holds run.json, state.safetensors and telemetry.jsonl; "" keeps everything in memory.
    **options: see `default_options()`, for example steps=100, learning_rate=1e-4,
        objective={"kl": 0.5, "ce": 0.5}, frozen=["model\\.embed_tokens"].

ArgumentError naming the option, or what does not fit together.)")
      .def(py::init([](std::shared_ptr<PreparedDecoder> student, const py::object& teacher, TokenData data,
                       const Path& run_folder, const py::kwargs& options) {
             if (py::isinstance<TeacherCache>(teacher)) {
               return std::make_unique<PythonTrainer>(std::move(student), teacher.cast<TeacherCache>(),
                                                      std::move(data), run_folder, options);
             }
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
          "step", [](PythonTrainer& self) { return self.trainer().step(); }, "Optimizer steps done.")
      .def_property_readonly(
          "warnings", [](PythonTrainer& self) { return self.trainer().warnings(); },
          "That the run made the model worse on the probe, and what in telemetry explains it; [] when it did "
          "not.");
}

}  // namespace

void bind_train(py::module_& module) {
  bind_data(module);
  bind_report(module);
  bind_trainer(module);
  module.def(
      "default_options", [] { return as_python(train::to_json(train::Options{})); },
      "Every option of `Trainer` with its default, as a dict.");
  module.def(
      "check_options",
      [](const py::kwargs& options) { return as_python(train::to_json(options_of(options))); },
      "The options completed by the defaults. ArgumentError naming an unknown or illegal one.");
  module.def(
      "needs_teacher",
      [](const py::kwargs& options) { return options_of(options).objective.needs_teacher(); },
      "Whether the objective of these options compares with a teacher.");
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
