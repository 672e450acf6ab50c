#pragma once

// A llama of one or more layers with numbers that can be checked by hand: codes follow a formula, scales are
// powers of two.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"

namespace tiny {

constexpr int64_t kVocabulary = 4;
constexpr int64_t kHidden = 64;
constexpr int64_t kFeedForward = 32;
constexpr int64_t kHeads = 2;
constexpr int64_t kKeyHeads = 1;
constexpr int64_t kHeadDim = kHidden / kHeads;

/// The code of row r, column i: every legal one of 16, in an order that differs from row to row.
inline int8_t code(int64_t row, int64_t column) {
  return static_cast<int8_t>((row * 5 + column * 3) % 16 - 8);
}

/// The scale of block b in row r: 2^-8 to 2^-1, every other one negative.
inline float scale(int64_t row, int64_t block) {
  const auto size = 1.0F / static_cast<float>(2 << ((row + block) % 8));
  return (row + block) % 2 == 0 ? size : -size;
}

/// Any grid with blocks of 32, symmetric codes and one scale.
inline qat::QuantizedTensor quantized(int64_t rows, int64_t width, const std::string& grid = "q4_0") {
  qat::QuantizedTensor tensor{{grid},
                              {rows, width},
                              at::empty({rows, width}, at::kChar),
                              at::empty({rows, width / 32, 1}, at::kFloat)};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) tensor.codes.data_ptr<int8_t>()[row * width + i] = code(row, i);
    for (int64_t block = 0; block < width / 32; ++block) {
      tensor.scales.data_ptr<float>()[row * width / 32 + block] = scale(row, block);
    }
  }
  return tensor;
}

inline std::string config(int64_t layers) {
  return R"({"model_type": "llama", "vocab_size": 4, "hidden_size": 64, "intermediate_size": 32,
             "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
             "max_position_embeddings": 128, "tie_word_embeddings": true, "num_hidden_layers": )" +
         std::to_string(layers) + "}";
}

inline qat::QuantizedCheckpoint checkpoint(int64_t layers = 1) {
  qat::QuantizedCheckpoint result;
  result.config = config(layers);
  result.tokenizer = "none";
  result.quantized["model.embed_tokens.weight"] = quantized(kVocabulary, kHidden, "q8_0");
  result.aliases["lm_head.weight"] = "model.embed_tokens.weight";
  result.floats["model.norm.weight"] = at::ones({kHidden}, at::kFloat);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto add = [&](const std::string& name, int64_t rows, int64_t width) {
      result.quantized[prefix + name + ".weight"] = quantized(rows, width);
    };
    add("self_attn.q_proj", kHidden, kHidden);
    add("self_attn.k_proj", kKeyHeads * kHeadDim, kHidden);
    add("self_attn.v_proj", kKeyHeads * kHeadDim, kHidden);
    add("self_attn.o_proj", kHidden, kHidden);
    add("mlp.gate_proj", kFeedForward, kHidden);
    add("mlp.up_proj", kFeedForward, kHidden);
    add("mlp.down_proj", kHidden, kFeedForward);
    for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight"}) {
      result.floats[prefix + norm] = at::ones({kHidden}, at::kFloat);
    }
  }
  return result;
}

/// A folder of its own, removed at the end.
class Folder {
 public:
  explicit Folder(const std::string& name)
      : path_(std::filesystem::temp_directory_path() / ("qat_export_" + name)) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string file(const std::string& name) const { return (path_ / name).string(); }
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

inline std::string read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

inline void write(const std::string& path, const std::string& text) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

}  // namespace tiny
