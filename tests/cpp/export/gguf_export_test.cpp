#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <signal.h>
#include <sys/resource.h>

#include <limits>

#include "qat/core/error.hpp"
#include "qat/export/export.hpp"
#include "qat/io/gguf.hpp"
#include "tiny_checkpoint.hpp"

#include "catch.hpp"

namespace {

using Catch::Contains;
using qat::ArgumentError;
using qat::UnsupportedError;

constexpr const char* kQuery = "model.layers.0.self_attn.q_proj.weight";

template <class Error>
std::string message_of(const qat::QuantizedCheckpoint& checkpoint, const std::string& path) {
  try {
    qat::export_checkpoint(checkpoint, path);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

std::vector<std::string> names_of(const std::string& path) {
  std::vector<std::string> names;
  const qat::io::GgufFile file(path);
  for (const auto& tensor : file.tensors()) names.push_back(tensor.name);
  return names;
}

}  // namespace

TEST_CASE("the targets are listed, and an unknown one is refused by name") {
  REQUIRE(qat::export_targets().front() == "gguf");
  const tiny::Folder folder("targets");
  REQUIRE_THROWS_WITH(qat::export_checkpoint(tiny::checkpoint(), folder.file("a"), "onnx"),
                      Contains("expected one of gguf, ") && Contains("got \"onnx\""));
  REQUIRE(folder.entries() == 0);
}

TEST_CASE("the bytes depend neither on the run nor on the number of threads") {
  const tiny::Folder folder("same");
  const int threads = at::get_num_threads();
  for (const int count : {1, 4}) {
    at::set_num_threads(count);
    qat::export_checkpoint(tiny::checkpoint(3), folder.file(std::to_string(count)));
  }
  at::set_num_threads(threads);
  REQUIRE(tiny::read(folder.file("1")) == tiny::read(folder.file("4")));
}

TEST_CASE("layers stand in the order of their numbers") {
  const tiny::Folder folder("order");
  qat::export_checkpoint(tiny::checkpoint(11), folder.file("a"));
  const auto names = names_of(folder.file("a"));
  REQUIRE(names.size() == 2 + 11 * 9);
  REQUIRE(names.front() == "token_embd.weight");
  REQUIRE(names[2 + 2 * 9] == "blk.2.attn_norm.weight");
  REQUIRE(names.back() == "blk.10.ffn_down.weight");
}

TEST_CASE("progress ends at all bytes of the tensors") {
  const tiny::Folder folder("progress");
  int64_t last = 0, all = 0;
  qat::ExportOptions options;
  options.progress = [&](int64_t done, int64_t total) {
    REQUIRE(done > last);
    last = done;
    all = total;
  };
  qat::export_checkpoint(tiny::checkpoint(), folder.file("a"), "gguf", options);
  int64_t bytes = 0;
  const qat::io::GgufFile file(folder.file("a"));
  for (const auto& tensor : file.tensors()) {
    bytes += static_cast<int64_t>(tensor.data.size());
  }
  REQUIRE(last == bytes);
  REQUIRE(all == bytes);
}

TEST_CASE("float matrices keep their type, vectors and norms become float32") {
  const tiny::Folder folder("floats");
  auto checkpoint = tiny::checkpoint();
  for (const char* key : {kQuery, "model.layers.0.self_attn.k_proj.weight"}) checkpoint.quantized.erase(key);
  checkpoint.floats[kQuery] = at::full({64, 64}, 0.5, at::kHalf);
  checkpoint.floats["model.layers.0.self_attn.k_proj.weight"] = at::full({32, 64}, 0.5, at::kBFloat16);
  checkpoint.floats["model.norm.weight"] = at::full({64}, 1.5, at::kBFloat16);
  checkpoint.floats["model.layers.0.self_attn.q_proj.bias"] = at::full({64}, 2.0, at::kHalf);
  qat::export_checkpoint(checkpoint, folder.file("a"));
  const qat::io::GgufFile file(folder.file("a"));
  REQUIRE(file.tensor("blk.0.attn_q.weight").type == 1);
  REQUIRE(file.tensor("blk.0.attn_k.weight").type == 30);
  REQUIRE(file.tensor("output_norm.weight").type == 0);
  REQUIRE(file.tensor("blk.0.attn_q.bias").type == 0);
  REQUIRE(qat::verify(folder.file("a"), checkpoint).empty());
}

TEST_CASE("an untied head is written, a tied one is left to the reader") {
  const tiny::Folder folder("head");
  auto checkpoint = tiny::checkpoint();
  SECTION("tied, the embedding being the alias") {
    checkpoint.quantized["lm_head.weight"] = checkpoint.quantized["model.embed_tokens.weight"];
    checkpoint.quantized.erase("model.embed_tokens.weight");
    checkpoint.aliases = {{"model.embed_tokens.weight", "lm_head.weight"}};
    qat::export_checkpoint(checkpoint, folder.file("a"));
    REQUIRE(qat::io::GgufFile(folder.file("a")).find_tensor("output.weight") == nullptr);
  }
  SECTION("untied") {
    checkpoint.aliases.clear();
    checkpoint.quantized["lm_head.weight"] = tiny::quantized(4, 64);
    qat::export_checkpoint(checkpoint, folder.file("a"));
    REQUIRE(qat::io::GgufFile(folder.file("a")).tensor("output.weight").type == 2);
  }
  REQUIRE(qat::verify(folder.file("a"), checkpoint).empty());
}

TEST_CASE("general.file_type is the type of most weights") {
  const tiny::Folder folder("file_type");
  auto checkpoint = tiny::checkpoint();
  for (auto& [key, tensor] : checkpoint.quantized) tensor.scheme.weight = "q8_0";
  qat::export_checkpoint(checkpoint, folder.file("a"));
  REQUIRE(qat::io::GgufFile(folder.file("a")).get<uint32_t>("general.file_type") == 7);
  for (const auto& [key, tensor] : checkpoint.quantized) {
    checkpoint.floats[key] = at::zeros(tensor.shape, at::kBFloat16);
  }
  checkpoint.quantized.clear();
  qat::export_checkpoint(checkpoint, folder.file("a"));
  const qat::io::GgufFile file(folder.file("a"));
  REQUIRE(file.get<uint32_t>("general.file_type") == 32);
  REQUIRE(file.metadata().find("general.quantization_version") == nullptr);
}

TEST_CASE("numbers of another grid go into the ggml type that holds them") {
  const tiny::Folder folder("fitted");
  const auto checkpoint = tiny::checkpoint();
  qat::export_checkpoint(checkpoint, folder.file("a"));
  auto other = checkpoint;
  for (auto& [key, tensor] : other.quantized) {
    if (tensor.scheme.weight == "q4_0") tensor.scheme.weight = "int4_g32";
  }
  REQUIRE(qat::can_export(other, "gguf").empty());
  qat::export_checkpoint(other, folder.file("b"));
  REQUIRE(tiny::read(folder.file("b")) == tiny::read(folder.file("a")));
  REQUIRE(qat::verify(folder.file("b"), other).empty());
}

TEST_CASE("what the file cannot hold is refused with the tensor's name, and an older file stays") {
  const tiny::Folder folder("refused");
  const std::string path = folder.file("a.gguf");
  tiny::write(path, "older");
  auto checkpoint = tiny::checkpoint();
  auto& query = checkpoint.quantized[kQuery];

  SECTION("another grid's numbers that no ggml type holds") {
    query.scheme.weight = "int4_channel";
    query.scales = at::full({64, 1, 1}, 0.1F);
    REQUIRE_THAT(
        message_of<UnsupportedError>(checkpoint, path),
        Contains(kQuery) &&
            Contains("(int4_channel): row 0, block 0: scales of q4_0 cannot hold 0.100000001 exactly"));
  }
  SECTION("a code beyond the grid") {
    query.codes.data_ptr<int8_t>()[5 * 64 + 3] = 8;
    REQUIRE_THAT(message_of<ArgumentError>(checkpoint, path), Contains(kQuery) && Contains("row 5"));
  }
  SECTION("a scale that float16 cannot hold") {
    query.scales.data_ptr<float>()[7 * 2] = 0.1F;
    REQUIRE_THAT(message_of<ArgumentError>(checkpoint, path), Contains(kQuery) && Contains("row 7"));
  }
  SECTION("a scale that is not finite") {
    query.scales.data_ptr<float>()[0] = std::numeric_limits<float>::infinity();
    REQUIRE_THAT(message_of<ArgumentError>(checkpoint, path), Contains(kQuery) && Contains("row 0"));
  }
  SECTION("scales of another shape") {
    query.scales = query.scales.reshape({64, 1, 2});
    REQUIRE_THAT(message_of<ArgumentError>(checkpoint, path), Contains(kQuery) && Contains("[64, 2, 1]"));
  }
  SECTION("a row that is no whole number of blocks") {
    query = {{"q4_0"}, {64, 40}, at::zeros({64, 40}, at::kChar), at::zeros({64, 1, 1}, at::kFloat)};
    REQUIRE_THAT(message_of<UnsupportedError>(checkpoint, path), Contains(kQuery) && Contains("[64, 40]"));
  }
  SECTION("a tensor that the family does not have") {
    checkpoint.floats["model.layers.0.lora.weight"] = at::zeros({4}, at::kFloat);
    REQUIRE_THAT(message_of<UnsupportedError>(checkpoint, path), Contains("model.layers.0.lora.weight"));
  }
  SECTION("a layer too many") {
    checkpoint.floats["model.layers.1.input_layernorm.weight"] = at::zeros({64}, at::kFloat);
    REQUIRE_THAT(message_of<UnsupportedError>(checkpoint, path), Contains("model.layers.1.input_layernorm"));
  }
  SECTION("missing tensors, all of them named") {
    checkpoint.quantized.erase(kQuery);
    checkpoint.floats.erase("model.norm.weight");
    REQUIRE_THAT(message_of<ArgumentError>(checkpoint, path),
                 Contains(kQuery) && Contains("model.norm.weight"));
  }
  SECTION("an alias that leads nowhere") {
    checkpoint.aliases["lm_head.weight"] = "nothing";
    REQUIRE_THAT(message_of<ArgumentError>(checkpoint, path),
                 Contains("lm_head.weight") && Contains("nothing"));
  }
  SECTION("a float type that GGUF lacks") {
    checkpoint.floats["model.norm.weight"] = at::ones({64}, at::kDouble);
    REQUIRE_THAT(message_of<ArgumentError>(checkpoint, path),
                 Contains("model.norm.weight") && Contains("double"));
  }
  REQUIRE(tiny::read(path) == "older");
  REQUIRE(folder.entries() == 1);
}

TEST_CASE("a configuration that does not describe the model is refused with its key") {
  const tiny::Folder folder("config");
  const std::string path = folder.file("a.gguf");
  auto checkpoint = tiny::checkpoint();
  const std::string whole = checkpoint.config;
  const auto refusal = [&](const std::string& config) {
    checkpoint.config = config;
    return message_of<qat::Error>(checkpoint, path);
  };
  REQUIRE_THAT(refusal(""), Contains("config") && Contains("got none"));
  REQUIRE_THAT(refusal("[1]"), Contains("config") && Contains("JSON object"));
  REQUIRE_THAT(refusal("{}"), Contains("model_type"));
  REQUIRE_THAT(refusal(replaced(whole, "llama", "mamba")), Contains("mamba"));
  REQUIRE_THAT(refusal(replaced(whole, "rms_norm_eps", "eps")), Contains("rms_norm_eps"));
  REQUIRE_THAT(refusal(replaced(whole, "\"vocab_size\": 4", "\"vocab_size\": 5")),
               Contains("model.embed_tokens.weight") && Contains("expected 5 rows"));
  REQUIRE_THAT(refusal(replaced(whole, "\"hidden_size\": 64", "\"hidden_size\": -64")),
               Contains("hidden_size"));
  REQUIRE_THAT(refusal(replaced(whole, "\"intermediate_size\": 32", "\"intermediate_size\": 5000000000")),
               Contains("intermediate_size"));
  REQUIRE_THAT(
      refusal(replaced(whole, "\"rope_theta\"", "\"rope_scaling\": {\"type\": \"dynamic\"}, \"rope_theta\"")),
      Contains("rope_scaling.type") && Contains("dynamic"));
  REQUIRE(folder.entries() == 0);
}

TEST_CASE("no tokenizer is an error that names the option") {
  const tiny::Folder folder("tokenizer");
  auto checkpoint = tiny::checkpoint();
  checkpoint.tokenizer = "";
  REQUIRE_THAT(message_of<ArgumentError>(checkpoint, folder.file("a")), Contains("--tokenizer-from"));
  checkpoint.tokenizer = folder.file("absent");
  REQUIRE_THAT(message_of<qat::FileError>(checkpoint, folder.file("a")),
               Contains("absent") && Contains("--tokenizer-from"));
}

TEST_CASE("a full disk leaves the older file and nothing else") {
  const tiny::Folder folder("full");
  const std::string path = folder.file("a.gguf");
  tiny::write(path, "older");
  rlimit former{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &former) == 0);
  const auto former_handler = signal(SIGXFSZ, SIG_IGN);
  const rlimit small{4096, former.rlim_max};  // less than the file: a write then fails as on a full disk
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string message = message_of<qat::FileError>(tiny::checkpoint(4), path);
  REQUIRE(setrlimit(RLIMIT_FSIZE, &former) == 0);
  signal(SIGXFSZ, former_handler);
  REQUIRE_THAT(message, Contains("a.gguf"));
  REQUIRE(tiny::read(path) == "older");
  REQUIRE(folder.entries() == 1);
}
