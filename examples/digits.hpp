#pragma once

// Data for finetune_custom.cpp: digits from a file, or drawn here when there is none.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

/// Pictures of digits, shuffled. N of them.
struct Digits {
  at::Tensor images;  ///< float32[N, 1, 28, 28], about zero mean and unit variance
  at::Tensor labels;  ///< int64[N], 0..9

  /// N.
  int64_t size() const { return labels.numel(); }
  /// Digits [begin, end).
  Digits slice(int64_t begin, int64_t end) const {
    return {images.slice(0, begin, end), labels.slice(0, begin, end)};
  }
};

/// A safetensors file with `images` u8[N, 28, 28] and `labels` i64[N], see mnist_to_safetensors.py.
/// qat::FileError when it is anything else.
Digits read_digits(const std::string& path);

/// `count` digits as a pocket calculator shows them: seven segments, each digit shifted, slanted, of another
/// width, and noisy. The same seed gives the same pictures.
Digits draw_digits(int64_t count, uint64_t seed);
