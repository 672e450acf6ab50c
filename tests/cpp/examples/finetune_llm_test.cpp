// The program as a user runs it: a process of its own, on a tiny model in Hugging Face's layout.

#include <ATen/TensorOperators.h>
#include <ATen/ops/randint.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "catch.hpp"
#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/export/export.hpp"
#include "qat/io/safetensors.hpp"
#include "qat/models/decoder.hpp"
#include "qat/train/token_data.hpp"
#include "train/scratch_folder.hpp"

namespace {

using Catch::Contains;
using Words = std::vector<std::string>;

constexpr int64_t kVocabulary = 12;

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// A Hugging Face folder with random weights and a tokenizer of twelve letters, and a text of 2,000 tokens.
class Inputs {
 public:
  Inputs() {
    std::filesystem::create_directory(folder_ / "hf");
    std::ofstream(folder_ / "hf/config.json") << config();
    std::ofstream(folder_ / "hf/tokenizer.json")
        << R"({"version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
               "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
               "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5, "g": 6, "h": 7,
                         "i": 8, "j": 9, "ab": 10, "cd": 11}, "merges": ["a b", "c d"]}})";
    write_weights();
    at::manual_seed(2);
    qat::train::write_tokens(folder_ / "text.tokens",
                             at::randint(kVocabulary, {2000}, at::TensorOptions(at::kLong)), kVocabulary);
  }

  std::string path(const std::string& name) const { return folder_ / name; }

  Words arguments(const std::string& out) const {
    return {"--model",
            path("hf"),
            "--tokens",
            path("text.tokens"),
            "--policy",
            "gguf-q4_0",
            "--out",
            path(out),
            "--steps",
            "6",
            "--seed",
            "3",
            "--learning-rate",
            "1e-3",
            "--sequence-length",
            "16",
            "--frozen",
            ".*norm"};
  }

 private:
  static std::string config() {
    return R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 12, "hidden_size": 64,
               "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
               "head_dim": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
               "hidden_act": "silu", "tie_word_embeddings": true, "torch_dtype": "float32"})";
  }

  void write_weights() const {
    at::manual_seed(1);
    qat::models::Decoder decoder(qat::models::config_from_json(config()));
    std::vector<qat::io::SafetensorsEntry> entries;
    const auto parameters = decoder.named_parameters();
    for (const auto& item : parameters) {
      entries.push_back({item.key(), qat::io::Dtype::kF32, item.value().sizes().vec(),
                         std::as_bytes(std::span(item.value().const_data_ptr<float>(),
                                                 static_cast<std::size_t>(item.value().numel())))});
    }
    qat::io::write_safetensors(folder_ / "hf/model.safetensors", entries);
  }

  ScratchFolder folder_;
};

/// finetune_llm under way.
class Process {
 public:
  explicit Process(const Words& arguments) {
    int ends[2];
    REQUIRE(pipe2(ends, O_CLOEXEC) == 0);
    Words words = arguments;
    words.insert(words.begin(), QAT_FINETUNE_LLM);
    std::vector<char*> pointers;
    for (std::string& word : words) pointers.push_back(word.data());
    pointers.push_back(nullptr);
    process_ = fork();
    REQUIRE(process_ >= 0);
    if (process_ == 0) {
      dup2(ends[1], STDOUT_FILENO);
      dup2(ends[1], STDERR_FILENO);
      execv(pointers[0], pointers.data());
      _exit(127);
    }
    close(ends[1]);
    output_ = fdopen(ends[0], "r");
  }
  ~Process() {
    if (output_ != nullptr) std::fclose(output_);
    if (process_ > 0) {
      kill(process_, SIGKILL);
      waitpid(process_, nullptr, 0);
    }
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  /// Reads lines up to one that begins with `start`; false at the end of the output.
  bool wait_for(const std::string& start) {
    char line[4096];
    while (std::fgets(line, sizeof line, output_) != nullptr) {
      text_ += line;
      if (std::string(line).rfind(start, 0) == 0) return true;
    }
    return false;
  }

  /// Reads the rest and returns the exit code.
  int finish() {
    wait_for("\n never");
    int status = 0;
    REQUIRE(waitpid(process_, &status, 0) == process_);
    process_ = -1;
    REQUIRE(WIFEXITED(status));
    return WEXITSTATUS(status);
  }

  pid_t id() const { return process_; }
  const std::string& text() const { return text_; }

 private:
  pid_t process_ = -1;
  std::FILE* output_ = nullptr;
  std::string text_;
};

}  // namespace

TEST_CASE("finetune_llm trains, ships a checkpoint and a GGUF that agree, and loads no Python") {
  const Inputs inputs;
  Words arguments = inputs.arguments("out");
  arguments.insert(arguments.end(), {"--eval", inputs.path("text.tokens")});
  Process process(arguments);
  REQUIRE(process.wait_for("step 1/6"));
  const std::string maps = read("/proc/" + std::to_string(process.id()) + "/maps");
  REQUIRE_THAT(maps, Contains("libqat_models") && Contains("libtorch_cpu"));
  REQUIRE_THAT(maps, !Contains("libpython") && !Contains("libtorch_python"));
  const int code = process.finish();
  INFO(process.text());
  REQUIRE(code == 0);
  REQUIRE_THAT(process.text(), Contains("model.layers.0.mlp.down_proj.weight") && Contains("step 6/6") &&
                                   Contains("the float model writes 192 tokens") &&
                                   Contains("starting from guided on 384 tokens") &&
                                   Contains("before: perplexity") && Contains("after: perplexity") &&
                                   Contains("0:00 left"));
  const auto checkpoint = qat::load(inputs.path("out/model.qat.safetensors"));
  REQUIRE(checkpoint.quantized.at("model.layers.0.mlp.down_proj.weight").scheme.weight == "q4_0");
  REQUIRE(qat::verify(inputs.path("out/model.gguf"), checkpoint).empty());
}

TEST_CASE("what a start looks at can be told") {
  const Inputs inputs;
  const auto said = [&](const std::string& out, const Words& further) {
    Words arguments = inputs.arguments(out);
    arguments.insert(arguments.end(), further.begin(), further.end());
    Process process(arguments);
    process.finish();
    return process.text();
  };
  const std::string some =
      said("some", {"--start-tokens", "64", "--start-generated", "0.75", "--beginning", "1"});
  CHECK_THAT(some, Contains("the float model writes 48 tokens") &&
                       Contains("starting from guided on 64 tokens") && Contains("wrote"));
  const std::string none = said("none", {"--start-generated", "0", "--start", "gptq"});
  CHECK_THAT(none, !Contains("the float model writes") && Contains("starting from gptq on 192 tokens"));
  CHECK_THAT(said("wrong", {"--start-generated", "1"}),
             Contains("error: finetune_llm: expected --start-tokens"));
}

TEST_CASE("Ctrl-C saves, and --resume ends in the same files as an uninterrupted run") {
  const Inputs inputs;
  REQUIRE(Process(inputs.arguments("whole")).finish() == 0);
  Words longer = inputs.arguments("broken");
  {
    Process process(longer);
    REQUIRE(process.wait_for("step 1/6"));
    kill(process.id(), SIGINT);
    const int code = process.finish();
    // A fast machine may have finished its few steps before the signal came.
    REQUIRE((code == 130 || code == 0));
    if (code == 130) REQUIRE_THAT(process.text(), Contains("--resume goes on"));
  }
  longer.push_back("--resume");
  Process process(longer);
  const int code = process.finish();
  INFO(process.text());
  REQUIRE(code == 0);
  REQUIRE_THAT(process.text(), Contains("resuming after step") && !Contains("starting from"));
  for (const char* file : {"model.qat.safetensors", "model.gguf", "run/state.safetensors"}) {
    REQUIRE(read(inputs.path(std::string("broken/") + file)) ==
            read(inputs.path(std::string("whole/") + file)));
  }
}

TEST_CASE("--start says where the weights begin; without one no scale is learned") {
  const Inputs inputs;
  const auto run = [&](const std::string& start) {
    Words arguments = inputs.arguments(start);
    arguments.insert(arguments.end(), {"--start", start});
    Process process(arguments);
    const int code = process.finish();
    INFO(process.text());
    REQUIRE(code == 0);
    return process.text();
  };
  REQUIRE_THAT(run("gptq"), Contains("starting from gptq"));
  REQUIRE_THAT(run("none"), !Contains("starting from"));
  REQUIRE_THAT(read(inputs.path("gptq/run/run.json")), Contains("learned"));
  REQUIRE_THAT(read(inputs.path("none/run/run.json")), !Contains("learned"));
}

TEST_CASE("with --teacher-cache the float model is asked once, and a second run reads its answers") {
  const Inputs inputs;
  const auto run = [&](const std::string& out) {
    Words arguments = inputs.arguments(out);
    arguments.insert(arguments.end(),
                     {"--teacher-cache", inputs.path("teacher.cache"), "--teacher-top-k", "8"});
    Process process(arguments);
    const int code = process.finish();
    INFO(process.text());
    REQUIRE(code == 0);
    return process.text();
  };
  REQUIRE_THAT(run("first"), Contains("asked the teacher") && Contains("loss with the cache"));
  REQUIRE_THAT(run("second"), !Contains("asked the teacher"));
  REQUIRE(read(inputs.path("first/model.gguf")) == read(inputs.path("second/model.gguf")));
}

TEST_CASE("mistakes end in one line that names them, and in exit code 1") {
  const Inputs inputs;
  const auto changed = [&](const std::string& flag, const std::string& value) {
    Words arguments = inputs.arguments("out");
    const auto at = std::find(arguments.begin(), arguments.end(), flag);
    if (at == arguments.end()) {
      arguments.insert(arguments.end(), {flag, value});
    } else {
      *(at + 1) = value;
    }
    Process process(arguments);
    REQUIRE(process.finish() == 1);
    const auto from = process.text().find("error: ");
    REQUIRE(from != std::string::npos);
    const std::string message = process.text().substr(from);
    REQUIRE(message.find('\n') == message.size() - 1);
    REQUIRE_FALSE(std::filesystem::exists(inputs.path("out/model.gguf")));
    return message;
  };
  REQUIRE_THAT(changed("--model", inputs.path("nothing")), Contains("nothing"));
  REQUIRE_THAT(changed("--tokens", inputs.path("no.tokens")), Contains("no.tokens"));
  REQUIRE_THAT(changed("--policy", "gguf-q9"), Contains("gguf-q9"));
  REQUIRE_THAT(changed("--steps", "many"), Contains("--steps") && Contains("many"));
  REQUIRE_THAT(changed("--steps", "0"), Contains("steps") && Contains("at least 1"));
  REQUIRE_THAT(changed("--sequence-length", "5000"), Contains("5000"));
  REQUIRE_THAT(changed("--frozen", "nothing"), Contains("frozen[0]"));
  REQUIRE_THAT(changed("--start", "awq"), Contains("--start") && Contains("guided, gptq or none"));
  REQUIRE_THAT(changed("--speed", "1"), Contains("--speed"));
  Process incomplete({"--model"});
  REQUIRE(incomplete.finish() == 1);
  Process help({"--help"});
  REQUIRE(help.finish() == 0);
  REQUIRE_THAT(help.text(), Contains("usage: finetune_llm") && Contains("--resume"));
}
