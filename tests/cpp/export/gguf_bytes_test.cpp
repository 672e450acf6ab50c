// The whole file of a tiny checkpoint, byte for byte, against a description written out here.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "qat/export/export.hpp"
#include "tiny_checkpoint.hpp"

#include "catch.hpp"

namespace {

/// Bytes of a GGUF, little-endian. (The test machine is little-endian too.)
class Bytes {
 public:
  template <class T>
  Bytes& number(T value) {
    char raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));
    text_.append(raw, sizeof(T));
    return *this;
  }
  Bytes& string(const std::string& value) {
    number<uint64_t>(value.size());
    text_ += value;
    return *this;
  }
  Bytes& key(const std::string& name, const std::string& value) {
    return string(name).number(8).string(value);
  }
  Bytes& key(const std::string& name, uint32_t value) { return string(name).number(4).number(value); }
  Bytes& key(const std::string& name, float value) { return string(name).number(6).number(value); }
  Bytes& raw(const std::string& bytes) {
    text_ += bytes;
    return *this;
  }
  Bytes& pad(std::size_t alignment) {
    text_.append((alignment - text_.size() % alignment) % alignment, '\0');
    return *this;
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

/// IEEE half of a power of two: sign, exponent with bias 15, no fraction.
uint16_t half(float power_of_two) {
  int exponent = 0;
  std::frexp(power_of_two, &exponent);
  return static_cast<uint16_t>((power_of_two < 0 ? 0x8000 : 0) | ((exponent - 1 + 15) << 10));
}

std::string q4_0_row(int64_t row, int64_t width) {
  Bytes bytes;
  for (int64_t block = 0; block < width / 32; ++block) {
    bytes.number(half(tiny::scale(row, block)));
    for (int64_t j = 0; j < 16; ++j) {
      const int low = tiny::code(row, block * 32 + j) + 8, high = tiny::code(row, block * 32 + j + 16) + 8;
      bytes.number(static_cast<uint8_t>(low | high << 4));
    }
  }
  return bytes.text();
}

std::string q8_0_row(int64_t row, int64_t width) {
  Bytes bytes;
  for (int64_t block = 0; block < width / 32; ++block) {
    bytes.number(half(tiny::scale(row, block)));
    for (int64_t j = 0; j < 32; ++j) bytes.number(tiny::code(row, block * 32 + j));
  }
  return bytes.text();
}

struct Expected {
  std::string name;
  std::vector<int64_t> dims;
  int32_t type;
  std::string data;
};

/// Rows 0, 1, ... of a Q4_0 matrix.
Expected matrix(const std::string& name, int64_t rows, int64_t width) {
  Expected expected{name, {width, rows}, 2, ""};
  for (int64_t row = 0; row < rows; ++row) expected.data += q4_0_row(row, width);
  return expected;
}

/// As llama.cpp stores q and k: in each head of 32 rows, 0 16 1 17 2 18 ...
Expected rope_matrix(const std::string& name, int64_t rows, int64_t width) {
  Expected expected{name, {width, rows}, 2, ""};
  for (int64_t head = 0; head < rows / 32; ++head) {
    for (int64_t j = 0; j < 16; ++j) {
      expected.data += q4_0_row(head * 32 + j, width) + q4_0_row(head * 32 + j + 16, width);
    }
  }
  return expected;
}

Expected ones(const std::string& name) {
  Bytes bytes;
  for (int i = 0; i < tiny::kHidden; ++i) bytes.number(1.0F);
  return {name, {tiny::kHidden}, 0, bytes.text()};
}

std::vector<Expected> expected_tensors() {
  Expected embedding{"token_embd.weight", {64, 4}, 8, ""};
  for (int64_t row = 0; row < 4; ++row) embedding.data += q8_0_row(row, 64);
  return {embedding,
          ones("output_norm.weight"),
          ones("blk.0.attn_norm.weight"),
          rope_matrix("blk.0.attn_q.weight", 64, 64),
          rope_matrix("blk.0.attn_k.weight", 32, 64),
          matrix("blk.0.attn_v.weight", 32, 64),
          matrix("blk.0.attn_output.weight", 64, 64),
          ones("blk.0.ffn_norm.weight"),
          matrix("blk.0.ffn_gate.weight", 32, 64),
          matrix("blk.0.ffn_up.weight", 32, 64),
          matrix("blk.0.ffn_down.weight", 64, 32)};
}

std::string expected_file() {
  const std::vector<Expected> tensors = expected_tensors();
  Bytes file;
  file.raw("GGUF").number<uint32_t>(3).number<int64_t>(11).number<int64_t>(17);
  file.key("general.architecture", std::string("llama")).key("general.type", std::string("model"));
  file.key("general.name", std::string("tiny")).key("general.size_label", std::string("19K"));
  file.key("general.file_type", 2U).key("general.quantization_version", 2U);
  file.key("llama.vocab_size", 4U).key("llama.context_length", 128U).key("llama.embedding_length", 64U);
  file.key("llama.block_count", 1U).key("llama.feed_forward_length", 32U);
  file.key("llama.attention.head_count", 2U).key("llama.attention.head_count_kv", 1U);
  file.key("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  file.key("llama.rope.freq_base", 500000.0F).key("llama.rope.dimension_count", 32U);
  file.key("tokenizer.ggml.model", std::string("none"));
  uint64_t offset = 0;
  for (const Expected& tensor : tensors) {
    file.string(tensor.name).number(static_cast<uint32_t>(tensor.dims.size()));
    for (const int64_t size : tensor.dims) file.number(size);
    file.number(tensor.type).number(offset);
    offset += (tensor.data.size() + 31) / 32 * 32;
  }
  file.pad(32);
  for (const Expected& tensor : tensors) file.raw(tensor.data).pad(32);
  return file.text();
}

}  // namespace

TEST_CASE("the file of a tiny checkpoint is what its description says, to the byte") {
  const tiny::Folder folder("bytes");
  qat::ExportOptions options;
  options.name = "tiny";
  qat::export_checkpoint(tiny::checkpoint(), folder.file("a.gguf"), "gguf", options);
  const std::string got = tiny::read(folder.file("a.gguf")), expected = expected_file();
  REQUIRE(got.size() == expected.size());
  const auto difference = std::mismatch(got.begin(), got.end(), expected.begin()).first - got.begin();
  REQUIRE(difference == static_cast<std::ptrdiff_t>(expected.size()));
}
