#pragma once

// Token files and the order in which they are read. File format (`*.tokens`): 16-byte header "QATTOK1\0",
// uint32 vocabulary size, uint32 reserved 0, then little-endian uint32 ids until the end. Memory-mapped.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace qat::train {

/// A tokenised text. Copies share the data.
class TokenData {
 public:
  /// Maps the file. FileError for a missing or malformed file, an empty one, or an id >= the vocabulary
  /// (naming its position).
  static TokenData open(const std::string& path);
  /// tokens: int64[n] in memory, n >= 1. vocabulary: ids must be below it; at most 2^32 - 1.
  static TokenData from_tensor(const at::Tensor& tokens, int64_t vocabulary);

  int64_t size() const noexcept;  ///< tokens
  int64_t vocabulary() const noexcept;
  /// A 64-bit hash of the vocabulary and all ids (FNV-1a over 32-bit words): the same text, the same number.
  std::uint64_t fingerprint() const noexcept;

  /// The `index`-th micro-batch of a run: int64[batch_size, length]. The text is cut into size() / length
  /// windows (the rest is dropped), and each epoch takes every window once, in an order that depends on
  /// `seed` and the epoch only, so any step can be recomputed after a resume. A batch may span two epochs.
  /// ArgumentError when the text is shorter than one window.
  at::Tensor batch(int64_t index, int64_t batch_size, int64_t length, int64_t seed) const;
  /// The windows of the text that make up that micro-batch, in its order; arguments as for `batch`.
  std::vector<int64_t> windows(int64_t index, int64_t batch_size, int64_t length, int64_t seed) const;
  /// The windows that the first `batches` micro-batches read, each once, in their order; at most `most` of
  /// them. Other arguments and errors as for `batch`.
  std::vector<int64_t> first_windows(int64_t batches, int64_t batch_size, int64_t length, int64_t seed,
                                     int64_t most) const;
  /// Windows of the text, int64[n, length]. ArgumentError for one that the text does not have.
  at::Tensor read(const std::vector<int64_t>& windows, int64_t length) const;
  /// All tokens as int64[n].
  at::Tensor tokens() const;

 private:
  struct Storage;
  explicit TokenData(std::shared_ptr<const Storage> storage);
  std::shared_ptr<const Storage> storage_;
};

/// Writes a token file atomically. tokens: int64[n], n >= 1. ArgumentError naming the position of an id
/// outside [0, vocabulary), FileError for the disk.
void write_tokens(const std::string& path, const at::Tensor& tokens, int64_t vocabulary);

}  // namespace qat::train
