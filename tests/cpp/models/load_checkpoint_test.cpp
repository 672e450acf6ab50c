#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "catch.hpp"
#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/models/load.hpp"
#include "qat/policy/policy.hpp"
#include "qat/prepare/prepare.hpp"

namespace {

using qat::models::Decoder;

constexpr const char* kConfig = R"({"model_type": "llama", "vocab_size": 40, "hidden_size": 32,
  "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": true})";

/// A path for a file that goes when the test ends.
class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "qat-test-XXXXXX").string();
    if (mkdtemp(name.data()) != nullptr) folder_ = name;
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  std::string file() const { return (folder_ / "model.qat.safetensors").string(); }

 private:
  std::filesystem::path folder_;
};

/// Matrices on q8_0, norms float, the head an alias of the embedding as Hugging Face's models have it.
qat::QuantizedCheckpoint freeze(const Decoder& decoder) {
  qat::QuantizedCheckpoint checkpoint;
  for (const auto& item : decoder.named_parameters()) {
    const at::Tensor latent = item.value().detach();
    if (latent.dim() > 1) {
      checkpoint.quantized[item.key()] = qat::quantize_tensor(item.key(), latent, {"q8_0"});
    } else {
      checkpoint.floats[item.key()] = latent;
    }
  }
  checkpoint.aliases["lm_head.weight"] = "model.embed_tokens.weight";
  checkpoint.config = kConfig;
  checkpoint.tokenizer = "somewhere";
  return checkpoint;
}

}  // namespace

TEST_CASE("a checkpoint becomes the decoder of its numbers") {
  const Scratch scratch;
  const Decoder decoder(qat::models::config_from_json(kConfig));
  const auto checkpoint = freeze(decoder);
  qat::save(checkpoint, scratch.file());
  const auto loaded = qat::models::load_checkpoint(scratch.file());
  REQUIRE(loaded.tokenizer == "somewhere");
  REQUIRE(qat::models::config_from_json(loaded.config).tie_word_embeddings);
  const auto parameters = loaded.decoder->named_parameters();
  REQUIRE(parameters.size() == decoder.named_parameters().size());
  for (const auto& item : parameters) {
    REQUIRE(at::equal(item.value(), qat::weight_of(checkpoint, item.key())));
    REQUIRE(item.value().requires_grad());
  }
  REQUIRE(loaded.decoder->forward(at::arange(12).reshape({2, 6})).sizes() == at::IntArrayRef({2, 6, 40}));
}

TEST_CASE("prepare, freeze and load_checkpoint agree on a tied decoder") {
  const Scratch scratch;
  const auto decoder = std::make_shared<Decoder>(qat::models::config_from_json(kConfig));
  auto prepared = qat::prepare(decoder, qat::Policy::preset("gguf-q4_0"));
  REQUIRE(prepared.slots().size() == 8);  // 7 matrices and the embedding, whose head is no slot of its own
  qat::save(qat::freeze(prepared, kConfig, "somewhere"), scratch.file());
  const auto shipped = qat::models::load_checkpoint(scratch.file()).decoder;
  const at::Tensor tokens = at::arange(12).reshape({2, 6});
  const auto scope = prepared.quantized();
  // The same products of the same numbers in the same order.
  REQUIRE(at::equal(decoder->forward(tokens), shipped->forward(tokens)));
  prepared.set_enabled(false);
  REQUIRE_FALSE(at::equal(decoder->forward(tokens), shipped->forward(tokens)));
}

TEST_CASE("a checkpoint that is no decoder is refused") {
  const Scratch scratch;
  const Decoder decoder(qat::models::config_from_json(kConfig));
  auto checkpoint = freeze(decoder);
  checkpoint.floats.erase("model.norm.weight");
  checkpoint.floats["head.bias"] = at::zeros({40});
  qat::save(checkpoint, scratch.file());
  REQUIRE_THROWS_WITH(qat::models::load_checkpoint(scratch.file()),
                      Catch::Contains("missing model.norm.weight; unknown head.bias"));
  checkpoint.config = "";
  qat::save(checkpoint, scratch.file());
  REQUIRE_THROWS_WITH(qat::models::load_checkpoint(scratch.file()),
                      Catch::Contains("configuration, got none"));
  REQUIRE_THROWS_AS(qat::models::load_checkpoint(scratch.file() + "x"), qat::FileError);
}
