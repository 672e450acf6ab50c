#pragma once

// Work on rows, split over the intra-op threads. Rows are independent, so the result does not depend on how
// many there are.

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <limits>

#include "ptq/check.hpp"

namespace qat::ptq {

/// Remembers the lowest row that failed, from any thread.
class FirstFailure {
 public:
  void record(int64_t row) noexcept {
    int64_t seen = row_.load();
    while (row < seen && !row_.compare_exchange_weak(seen, row)) {
    }
  }
  /// -1 when no row failed.
  int64_t row() const noexcept { return row_ == kNone ? -1 : row_.load(); }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> row_{kNone};
};

/// Runs a function `Status (int64_t row)` on rows [0, rows). `make` returns that function; it is called once
/// per range of rows, so the function may own buffers. Throws NumericError for the lowest row that failed.
template <class Make>
void for_each_row(const Subject& subject, int64_t rows, const Make& make) {
  FirstFailure failure;
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    auto function = make();
    for (int64_t row = begin; row < end; ++row) {
      if (function(row) == grid::Status::kOk) continue;
      failure.record(row);
      return;
    }
  });
  if (const int64_t row = failure.row(); row >= 0) fail_row(subject, row, make()(row));
}

}  // namespace qat::ptq
