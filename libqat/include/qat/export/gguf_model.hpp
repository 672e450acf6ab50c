#pragma once

// A llama.cpp model file under Hugging Face's names: the configuration that its metadata says, and where each
// tensor's blocks and rows are. Nothing is decoded here.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "qat/arch/layers.hpp"
#include "qat/grid/ggml.hpp"
#include "qat/io/gguf.hpp"

namespace qat {

/// One tensor of the file.
struct GgufModelTensor {
  const io::GgufTensor* stored = nullptr;
  const grid::GgmlType* type = nullptr;
  const arch::TensorRule* rule = nullptr;  ///< null for a name that the family does not know
  int64_t heads = 0;                       ///< whose rows are interleaved; 0: rows in the same order
  double offset = 0.0;                     ///< the file's values are the Hugging Face tensor's plus this
};

/// An open file of a known family.
class GgufModel {
 public:
  /// `function` begins the messages. FileError for a malformed file and for missing keys, UnsupportedError
  /// naming the key or the tensor for what libqat has no table or no grid for.
  GgufModel(const std::string& function, const std::string& path);

  const arch::Family& family() const noexcept { return *family_; }
  /// config.json's text.
  const std::string& config() const noexcept { return config_; }
  /// By Hugging Face name (the file's where the family has none). Without the tensors that hold derived
  /// values, and without those that nothing reads.
  const std::map<std::string, GgufModelTensor>& tensors() const noexcept { return tensors_; }
  const arch::ModelShape& shape() const noexcept { return shape_; }
  /// FileError naming the tensors that a model of this shape has and the file lacks.
  void require_complete() const;
  /// For each row of the file its place in the Hugging Face tensor; empty when all rows stay. FileError when
  /// the rows are not whole heads.
  std::vector<int64_t> row_order(const GgufModelTensor& tensor) const;
  /// "function: path: ".
  const std::string& where() const noexcept { return where_; }

 private:
  void add(const io::GgufTensor& stored, int64_t query_heads, int64_t key_heads);

  std::string where_;
  std::shared_ptr<const io::GgufFile> file_;
  const arch::Family* family_;
  std::string config_;
  arch::ModelShape shape_;
  std::map<std::string, GgufModelTensor> tensors_;
};

}  // namespace qat
