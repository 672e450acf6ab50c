// Fine-tunes a language model so that it keeps its quality on a grid, and writes what ships. No Python.
//
//     finetune_llm --model DIR_OR_GGUF --tokens TEXT.tokens --policy gguf-q4_0 --out out/smollm2
//
// --model is a Hugging Face folder or a GGUF file of the llama family; the teacher is the float model as it
// was loaded. Training begins at a PTQ method's solution on its own text, with the rates that
// qat::recommended names for the grids, unless told otherwise. Tokenising is left to Python, once per text:
//
//     tokens = libqat.data.tokenize(libqat.load_tokenizer(model), texts)
//     libqat.write_tokens("text.tokens", tokens, vocabulary)

#include <ATen/ops/arange.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/export/export.hpp"
#include "qat/models/generate.hpp"
#include "qat/models/load.hpp"
#include "qat/policy/recipe.hpp"
#include "qat/prepare/prepare.hpp"
#include "qat/ptq/guided.hpp"
#include "qat/train/cache_check.hpp"
#include "qat/train/compute.hpp"
#include "qat/train/trainer.hpp"

namespace {

constexpr const char* kUsage =
    R"(usage: finetune_llm --model DIR_OR_GGUF --tokens FILE.tokens --policy PRESET_OR_JSON --out DIR [options]

Writes DIR/model.qat.safetensors, DIR/model.gguf and the run folder DIR/run.

  --steps N             optimizer steps (100)
  --batch-size N        sequences per micro-batch (2)
  --sequence-length N   tokens per sequence (256)
  --accumulate N        micro-batches per step (1)
  --start S             guided, gptq or none: where the weights start (what suits the grids)
  --start-tokens N      that guided and gptq look at, at most (102400)
  --start-generated X   share of them that the float model writes itself (0.5)
  --beginning ID        token that its texts begin with, if the model knows one
  --learning-rate X     peak (what suits the grids)
  --kl X, --ce X        weights of KL to the float model (1) and of cross-entropy (0)
  --compute-dtype D     auto, float32 or bfloat16 (auto)
  --seed N              order of the text (0)
  --frozen REGEX        parameters that are not trained ("model\.embed_tokens(_per_layer)?"; "" trains all)
  --teacher-cache FILE  ask the float model once, keep its answers there, and train without it
  --teacher-top-k N     tokens per position that the file keeps (64)
  --eval FILE.tokens    held-out text, scored at the start and the end
  --tokenizer PATH      a GGUF, tokenizer.json or folder for the GGUF file; "none" leaves it out
  --resume              go on with the run in DIR/run
Ctrl-C saves the run and stops.
)";

const std::set<std::string> kFlags = {"--model",
                                      "--tokens",
                                      "--policy",
                                      "--out",
                                      "--steps",
                                      "--seed",
                                      "--batch-size",
                                      "--sequence-length",
                                      "--accumulate",
                                      "--kl",
                                      "--ce",
                                      "--learning-rate",
                                      "--compute-dtype",
                                      "--frozen",
                                      "--eval",
                                      "--tokenizer",
                                      "--teacher-cache",
                                      "--teacher-top-k",
                                      "--start",
                                      "--start-tokens",
                                      "--start-generated",
                                      "--beginning"};

/// What is recommended for the grids; with another start than the recommended one, the library's own rates.
qat::Recipe read_recipe(const Arguments& arguments) {
  const auto policy = qat::Policy::load(arguments.required("--policy"));
  qat::Recipe recipe = qat::recommended(policy);
  const std::string start = arguments.text("--start", recipe.start);
  if (start != "guided" && start != "gptq" && start != "none") {
    throw qat::ArgumentError("finetune_llm: --start: expected guided, gptq or none, got \"" + start + "\"");
  }
  if (start != recipe.start) recipe = {.policy = start == "none" ? policy : recipe.policy, .start = start};
  arguments.read("--start-tokens", recipe.start_tokens);
  arguments.read("--start-generated", recipe.start_generated);
  if (recipe.start_tokens < 1 || !(recipe.start_generated >= 0 && recipe.start_generated < 1)) {
    throw qat::ArgumentError(
        "finetune_llm: expected --start-tokens of at least 1, 0 <= --start-generated < 1");
  }
  return recipe;
}

qat::train::Options read_options(const Arguments& arguments, const qat::Recipe& recipe) {
  qat::train::Options options;
  options.learning_rate = recipe.learning_rate;
  options.scale_learning_rate = recipe.scale_learning_rate;
  options.final_learning_rate = recipe.final_learning_rate;
  arguments.read("--steps", options.steps);
  arguments.read("--batch-size", options.batch_size);
  arguments.read("--sequence-length", options.sequence_length);
  arguments.read("--accumulate", options.accumulate);
  arguments.read("--learning-rate", options.learning_rate);
  arguments.read("--kl", options.objective.kl);
  arguments.read("--ce", options.objective.ce);
  arguments.read("--seed", options.seed);
  options.compute_dtype = arguments.text("--compute-dtype", options.compute_dtype);
  const std::string frozen = arguments.text("--frozen", "model\\.embed_tokens(_per_layer)?");
  if (!frozen.empty()) options.frozen = {frozen};
  qat::train::validate(options);
  return options;
}

qat::train::Trainer* running = nullptr;

extern "C" void stop_on_signal(int) {
  if (running != nullptr) running->request_stop();
}

/// Ctrl-C ends the run after the step under way for as long as the object lives.
class StopOnInterrupt {
 public:
  explicit StopOnInterrupt(qat::train::Trainer& trainer) {
    running = &trainer;
    std::signal(SIGINT, stop_on_signal);
  }
  ~StopOnInterrupt() {
    std::signal(SIGINT, SIG_DFL);
    running = nullptr;
  }
  StopOnInterrupt(const StopOnInterrupt&) = delete;
  StopOnInterrupt& operator=(const StopOnInterrupt&) = delete;
};

bool print_progress(const qat::train::StepReport& report) {
  const auto seconds = static_cast<long>(report.seconds_left);
  std::printf("step %ld/%ld  loss %.4f  %.0f tokens/s  %ld:%02ld left", static_cast<long>(report.step),
              static_cast<long>(report.steps), report.loss, report.tokens_per_second, seconds / 60,
              seconds % 60);
  if (report.flip_rate >= 0) {
    std::printf("  flips %.2f%%  distance %.3f", 100 * report.flip_rate, report.distance_to_grid);
  }
  std::printf("\n");
  std::fflush(stdout);
  return true;
}

/// A model on its way: the float teacher, and the student whose parameters are the latents.
struct Session {
  at::ScalarType compute;
  qat::models::LoadedModel loaded;
  std::shared_ptr<qat::models::Decoder> teacher;
  qat::PreparedModel model;

  Session(const Arguments& arguments, const qat::Policy& policy)
      : compute(qat::train::compute_dtype(arguments.text("--compute-dtype", "auto"))),
        loaded(qat::models::load_model(arguments.required("--model"))),
        teacher(loaded.decoder->frozen_copy(compute)),
        model(qat::prepare(loaded.decoder, policy)) {}

  /// What decides a teacher's answers besides its weights.
  std::string note() const { return loaded.config + "\n" + c10::toString(compute); }

  at::Tensor answer(const at::Tensor& tokens) const { return loaded.decoder->forward(tokens); }
  at::Tensor teach(const at::Tensor& tokens) const { return teacher->forward(tokens); }
};

void print_score(Session& session, const Arguments& arguments, const char* when) {
  if (!arguments.has("--eval")) return;
  const at::Tensor tokens = qat::train::TokenData::open(arguments.required("--eval")).tokens();
  const auto scope = session.model.quantized();
  const qat::train::ComputeScope compute(session.compute);
  const auto scores =
      qat::eval::compare([&](const at::Tensor& batch) { return session.teach(batch); },
                         {[&](const at::Tensor& batch) { return session.answer(batch); }}, tokens);
  std::printf("%s: perplexity %.3f (float %.3f)  KL to float %.4f  top-1 %.4f  [%ld tokens]\n", when,
              scores[1].perplexity(), scores[0].perplexity(), scores[1].kl, scores[1].top1,
              static_cast<long>(scores[1].tokens));
}

bool print_cache_progress(const qat::train::CacheProgress& progress) {
  std::printf("asked the teacher %ld of %ld windows  %.0f tokens/s  %.0f s left\n",
              static_cast<long>(progress.done), static_cast<long>(progress.total), progress.tokens_per_second,
              progress.seconds_left);
  return true;
}

/// The teacher's answers from --teacher-cache, which are computed first; the float model is then given up,
/// unless --eval will ask it. Nothing without the flag: the teacher stays.
std::optional<qat::train::TeacherCache> ask_teacher(Session& session, const Arguments& arguments,
                                                    const qat::train::TokenData& text,
                                                    const qat::train::Options& options) {
  namespace train = qat::train;
  if (!arguments.has("--teacher-cache") || !options.objective.needs_teacher()) return std::nullopt;
  const std::string path = arguments.required("--teacher-cache");
  int64_t top_k = 64;
  arguments.read("--teacher-top-k", top_k);
  const train::CachePlan plan = train::plan_teacher_cache(
      text, options, top_k, train::fingerprint(*session.loaded.decoder, session.note()));
  const train::LanguageModel teacher = train::in_halves(session.teacher);
  if (train::TeacherCache::missing(path, plan) > 0) {
    train::TeacherCache::build(path, plan, teacher, text, options, print_cache_progress);
    const train::CacheCheck check =
        train::check_teacher_cache(session.model, train::in_halves(session.loaded.decoder), teacher,
                                   train::TeacherCache::open(path, plan), text, options);
    std::printf("loss with the cache %.4f, with the teacher itself %.4f\n", check.cached, check.live);
  }
  if (!arguments.has("--eval")) session.teacher.reset();
  return train::TeacherCache::open(path, plan);
}

/// What a start looks at, int64[n, T]: what the run reads first, and text that the float model writes.
at::Tensor start_text(const qat::Recipe& recipe, Session& session, const Arguments& arguments,
                      const qat::train::TokenData& text, const qat::train::Options& options) {
  const double written = recipe.start_generated;
  const int64_t length = options.sequence_length;
  const auto most = static_cast<int64_t>(static_cast<double>(recipe.start_tokens) * (1 - written)) / length;
  const at::Tensor read = text.read(text.first_windows(options.steps * options.accumulate, options.batch_size,
                                                       length, options.seed, std::max<int64_t>(1, most)),
                                    length);
  const auto count = std::lround(static_cast<double>(read.size(0)) * written / (1 - written));
  if (count == 0) return read;
  std::printf("the float model writes %ld tokens\n", count * static_cast<long>(length));
  std::fflush(stdout);
  qat::models::GenerateOptions writing{.seed = options.seed};
  if (arguments.has("--beginning")) arguments.read("--beginning", writing.beginning.emplace());
  const at::Tensor first = at::arange(text.vocabulary());
  const at::Tensor generated = qat::models::generate(*session.teacher, count, length, first, writing);
  return qat::models::mixed({read, generated}, options.seed);
}

/// Rounds the model by a PTQ method; training goes on from there, with the scales that were found.
void begin_at(const qat::Recipe& recipe, Session& session, const at::Tensor& windows) {
  std::printf("starting from %s on %ld tokens\n", recipe.start.c_str(), static_cast<long>(windows.numel()));
  std::fflush(stdout);
  const qat::train::ComputeScope compute(session.compute);
  const auto stages = session.loaded.decoder->stages();
  const auto logits = [&](const at::Tensor& tokens) { return session.answer(tokens); };
  if (recipe.start == "gptq") {
    qat::ptq::apply_gptq(session.model, stages, windows);
  } else {
    qat::ptq::apply_guided(session.model, stages, logits, windows);
  }
}

/// The trainer with the teacher's answers, or with the teacher itself.
std::unique_ptr<qat::train::Trainer> make_trainer(Session& session,
                                                  std::optional<qat::train::TeacherCache> answers,
                                                  const qat::train::TokenData& text,
                                                  const qat::train::Options& options,
                                                  const std::string& folder) {
  namespace train = qat::train;
  const train::LanguageModel student = train::in_halves(session.loaded.decoder);
  if (answers) {
    return std::make_unique<train::Trainer>(session.model, student, *answers, text, options, folder);
  }
  return std::make_unique<train::Trainer>(session.model, student, train::in_halves(session.teacher), text,
                                          options, folder);
}

/// Writes checkpoint and GGUF and reads both back.
void ship(const Session& session, const Arguments& arguments, const std::filesystem::path& out) {
  const qat::QuantizedCheckpoint checkpoint =
      qat::freeze(session.model, session.loaded.config, session.loaded.tokenizer);
  const std::string checkpoint_path = (out / "model.qat.safetensors").string();
  const std::string gguf_path = (out / "model.gguf").string();
  qat::save(checkpoint, checkpoint_path);
  qat::ExportOptions options;
  options.tokenizer_from = arguments.text("--tokenizer", "");
  qat::export_checkpoint(checkpoint, gguf_path, "gguf", options);
  for (const std::string& path : {checkpoint_path, gguf_path}) {
    const auto differences = qat::verify(path, checkpoint);
    if (!differences.empty()) throw qat::Error("finetune_llm: " + path + ": " + differences.front().first);
    std::printf("wrote %s: every weight reads back as it was trained\n", path.c_str());
  }
}

/// The exit code.
int finetune(const Arguments& arguments) {
  if (arguments.has("--help")) return std::fputs(kUsage, stdout) < 0;
  const std::filesystem::path out = arguments.required("--out");
  const qat::Recipe recipe = read_recipe(arguments);
  const qat::train::Options options = read_options(arguments, recipe);
  const auto text = qat::train::TokenData::open(arguments.required("--tokens"));
  Session session(arguments, recipe.policy);
  const bool starts = !arguments.has("--resume") && recipe.start != "none";
  // While the float model is there, which ask_teacher may give up.
  const at::Tensor windows = starts ? start_text(recipe, session, arguments, text, options) : at::Tensor();
  const auto answers = ask_teacher(session, arguments, text, options);
  if (starts) begin_at(recipe, session, windows);
  const auto trainer = make_trainer(session, answers, text, options, (out / "run").string());
  std::printf("%s\n", qat::to_string(session.model.report()).c_str());
  if (arguments.has("--resume")) {
    trainer->resume();
    std::printf("resuming after step %ld\n", static_cast<long>(trainer->step()));
  } else {
    print_score(session, arguments, "before");
  }
  trainer->set_progress(print_progress);
  {
    const StopOnInterrupt guard(*trainer);
    if (trainer->run() == qat::train::Outcome::kInterrupted) {
      std::printf("stopped; the run is saved, --resume goes on with it\n");
      return 130;  // what shells expect of a program that Ctrl-C ended
    }
  }
  print_score(session, arguments, "after");
  ship(session, arguments, out);
  return 0;
}

}  // namespace

int main(int count, char** values) {
  try {
    return finetune({count, values, "finetune_llm", kFlags});
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
