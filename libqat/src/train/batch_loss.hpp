#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "qat/prepare/prepare.hpp"
#include "qat/train/language_model.hpp"
#include "qat/train/options.hpp"
#include "qat/train/teacher_cache.hpp"
#include "qat/train/token_data.hpp"

namespace qat::train {

/// The loss of micro-batches: who is asked, about which text, in which precision.
class BatchLoss {
 public:
  /// Errors are those of Trainer's constructor. `model` must outlive it.
  BatchLoss(PreparedModel& model, LanguageModel student, LanguageModel teacher,
            std::optional<TeacherCache> cache, TokenData data, const Options& options, at::Device device);

  /// The loss of these windows of the text, with its graph.
  at::Tensor operator()(const std::vector<int64_t>& windows, const Objective& objective);
  /// The teacher's answer to windows of the text.
  TeacherAnswer teach(const std::vector<int64_t>& windows) const;
  /// KL(teacher || student) in nats over windows of the text, at temperature 1, or that of the cache; without
  /// a graph. answer: the teacher's.
  double divergence(const std::vector<int64_t>& windows, const TeacherAnswer& answer);
  /// Scores tokens int64[n] of teacher (if it is live) and student.
  std::vector<eval::Score> evaluate(const at::Tensor& tokens, const eval::Options& settings);

  const TokenData& data() const noexcept { return data_; }
  const std::optional<TeacherCache>& cache() const noexcept { return cache_; }
  bool live_teacher() const noexcept { return static_cast<bool>(teacher_); }
  /// kFloat or kBFloat16.
  at::ScalarType compute() const noexcept { return compute_; }

 private:
  at::Tensor read(const std::vector<int64_t>& windows) const;
  at::Tensor loss(const at::Tensor& tokens, const TeacherAnswer& answer, const Objective& objective);

  PreparedModel& model_;
  LanguageModel student_, teacher_;
  std::optional<TeacherCache> cache_;
  TokenData data_;
  Options options_;
  at::Device device_;
  at::ScalarType compute_;
};

}  // namespace qat::train
