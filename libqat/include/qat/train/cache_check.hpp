#pragma once

#include "qat/prepare/prepare.hpp"
#include "qat/train/teacher_cache.hpp"

namespace qat::train {

/// What a cached teacher costs in accuracy, measured where training begins.
struct CacheCheck {
  int64_t tokens = 0;  ///< predicted
  double live = 0;     ///< temperature^2 * KL with the teacher itself, nats
  double cached = 0;   ///< the same with the cache; at most `live`, up to rounding
  double cosine =
      1;  ///< between the two gradients by the student's hidden states (logits when not in halves)
};

/// Both losses on the run's first `batches` micro-batches, the student being called inside
/// `model.quantized()` with gradients off. teacher: the live one; cache: of a plan of these options.
CacheCheck check_teacher_cache(PreparedModel& model, const LanguageModel& student,
                               const LanguageModel& teacher, const TeacherCache& cache, const TokenData& data,
                               const Options& options, int64_t batches = 2);

}  // namespace qat::train
