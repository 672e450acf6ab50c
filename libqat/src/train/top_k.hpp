#pragma once

#include "qat/train/objective.hpp"
#include "train/cache_format.hpp"

namespace qat::train {

/// The k most likely tokens of each predicted position and the rest, as a cache stores them, on the CPU.
/// answer: logits, or hidden states and a head, of B windows; taken in pieces of rows.
/// -> ids int64[B, T - 1, k], ascending; log_p float32[B, T - 1, k + 1].
WindowAnswer top_outcomes(const TeacherAnswer& answer, const CacheKey& key);

}  // namespace qat::train
