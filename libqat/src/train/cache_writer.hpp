#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "train/cache_format.hpp"

namespace qat::train {

/// The one process that adds records to a cache. Torn and damaged places are used first.
class CacheWriter {
 public:
  /// Makes the file if there is none. FileError for a file of another key or kind, and when another writer
  /// has it.
  CacheWriter(std::string path, const CacheKey& key);
  ~CacheWriter();
  CacheWriter(const CacheWriter&) = delete;
  CacheWriter& operator=(const CacheWriter&) = delete;

  bool holds(int64_t window) const { return index_.slots.contains(window); }
  void add(int64_t window, const WindowAnswer& answer);
  /// Waits until everything is on the disk.
  void sync();

  const CacheLayout& layout() const noexcept { return layout_; }

 private:
  [[noreturn]] void fail(const char* action) const;

  std::string path_;
  CacheLayout layout_;
  int descriptor_ = -1;
  CacheIndex index_;
};

}  // namespace qat::train
