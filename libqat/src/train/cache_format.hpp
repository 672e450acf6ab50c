#pragma once

// The bytes of a teacher cache; the layout is described in qat/train/teacher_cache.hpp.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "qat/train/teacher_cache.hpp"

namespace qat::train {

constexpr std::size_t kCacheHeaderBytes = 64;

/// Where the parts of a record begin.
struct CacheLayout {
  int64_t positions, top_k, vocabulary, id_bytes;
  std::size_t ids, log_p, rest, checksum, bytes;

  /// ArgumentError for a key that no file can have.
  explicit CacheLayout(const CacheKey& key);
};

std::array<std::byte, kCacheHeaderBytes> write_header(const CacheKey& key);

/// FileError unless `file` begins with the header of `key`, naming what differs.
void check_header(const std::string& path, std::span<const std::byte> file, const CacheKey& key);

/// What one window's record says. ids: int64[n, k] ascending in each row; log_p: float[n, k + 1].
struct WindowAnswer {
  at::Tensor ids, log_p;
};

/// A record of layout.bytes.
std::vector<std::byte> write_record(const CacheLayout& layout, int64_t window, const WindowAnswer& answer);

/// Fills ids int64[n, k] and log_p float32[n, k + 1], contiguous, from a record whose checksum holds. False
/// for ids that do not ascend or leave the vocabulary and for log-probabilities above 0 or not numbers.
bool read_record(const CacheLayout& layout, std::span<const std::byte> record, const WindowAnswer& answer);

/// Whether the record's checksum holds.
bool record_is_whole(const CacheLayout& layout, std::span<const std::byte> record);

/// Where the records of a file are. slot: the number of a record, from 0.
struct CacheIndex {
  std::unordered_map<int64_t, int64_t> slots;  ///< window -> slot
  std::vector<int64_t> damaged;                ///< slots to write anew; found only when verified
  int64_t whole = 0;                           ///< slots in the file
  std::size_t torn = 0;                        ///< bytes after the last slot
};

/// file: with a header that was checked. verify: read all records and compare their checksums.
CacheIndex index_cache(const CacheLayout& layout, std::span<const std::byte> file, bool verify);

/// The bytes of a slot.
std::span<const std::byte> cache_slot(const CacheLayout& layout, std::span<const std::byte> file,
                                      int64_t slot);

}  // namespace qat::train
