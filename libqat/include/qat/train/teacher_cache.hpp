#pragma once

// A teacher's answers on disk, so that a text read twice is answered once and no float model is kept in
// memory: per predicted position the k most likely tokens, and what is left for all others together.
//
// File format, version 1; little-endian; sizes in bytes.
//   header, 64:  8 magic "QATTCH1\0" | u64 fingerprint of the teacher | u64 fingerprint of the text
//                | u64 vocabulary V | u64 window length T | u64 k | f64 temperature t
//                | u64 checksum of the 56 bytes before
//   then records of one size, in the order in which they were computed:
//                u64 w, the window: tokens [w T, (w + 1) T) of the text, whose n = T - 1 positions follow
//                | n*k ids, u16 if V <= 65536, else u32; ascending within a position
//                | n*k f16 log-probabilities, softmax(logits / t), rounded to nearest even
//                | n f32 log of the mass of all other tokens
//                | zeros up to a multiple of 8 | u64 checksum of the record so far
// A checksum folds 8-byte words with splitmix64's finaliser: h = mix(h ^ word), from h = 0.
// A record stands for itself, so a build that was killed at any moment loses at most the record under way:
// the next build finds records that are torn or damaged by their checksums and computes them again.

#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "qat/train/language_model.hpp"
#include "qat/train/objective.hpp"
#include "qat/train/options.hpp"
#include "qat/train/token_data.hpp"

namespace qat::train {

/// A 64-bit hash of names, types, shapes and bytes of all parameters and buffers, and of `also`: what else
/// decides what the model answers (its configuration, the compute dtype).
std::uint64_t fingerprint(const torch::nn::Module& module, std::string_view also = "");

/// What answers are for. A file holds the answers of one key; another is refused.
struct CacheKey {
  std::uint64_t teacher = 0;  ///< `fingerprint` of the model that answers
  std::uint64_t text = 0;     ///< TokenData::fingerprint()
  int64_t vocabulary = 0;     ///< V
  int64_t length = 0;         ///< T, tokens in a window
  int64_t top_k = 0;          ///< k, 1 <= k < V
  double temperature = 1;     ///< objective.temperature
};

/// The answers that one run needs.
struct CachePlan {
  CacheKey key;
  std::vector<int64_t> windows;  ///< of the text, ascending

  /// Of a file that holds these answers and no others.
  int64_t bytes() const;
};

/// The windows that a run with these options reads: all of them, or those of its batches and of its probe
/// (see StepReport) when they are fewer. ArgumentError for a top_k outside [1, vocabulary) and for text
/// shorter than one window.
CachePlan plan_teacher_cache(const TokenData& data, const Options& options, int64_t top_k,
                             std::uint64_t teacher);

/// Where `TeacherCache::build` stands.
struct CacheProgress {
  int64_t done = 0;   ///< windows of the plan that are there
  int64_t total = 0;  ///< windows of the plan
  double tokens_per_second = 0;
  double seconds_left = 0;
};

/// The stored answers of a teacher, read from their file. Copies share the mapping.
class TeacherCache {
 public:
  /// How many windows of the plan the file lacks; all when there is no file. FileError as `open`.
  static int64_t missing(const std::string& path, const CachePlan& plan);
  /// Computes what is missing, and nothing else. teacher: called with options.batch_size windows at a time,
  /// without gradients, under autocast when the compute dtype is bfloat16. progress: after each call; return
  /// false to stop. True when the plan is complete; what was computed stays in any case. FileError for a file
  /// of another key or kind (it is left alone), when another process builds the same file, and for the disk;
  /// NumericError naming the window for an answer that is not a distribution.
  static bool build(const std::string& path, const CachePlan& plan, const LanguageModel& teacher,
                    const TokenData& data, const Options& options,
                    const std::function<bool(const CacheProgress&)>& progress = {});
  /// Maps the file. FileError when it is missing or malformed, belongs to another key (naming what differs),
  /// or lacks windows of the plan.
  static TeacherCache open(const std::string& path, const CachePlan& plan);

  const CacheKey& key() const noexcept;
  /// Whether the answer to this window of the text is there.
  bool holds(int64_t window) const noexcept;
  /// The answers to windows of the text, one per sequence of a batch. FileError naming a window that is not
  /// there or whose record is damaged.
  TeacherAnswer answer(const std::vector<int64_t>& windows) const;

 private:
  struct Storage;
  explicit TeacherCache(std::shared_ptr<const Storage> storage);
  std::shared_ptr<const Storage> storage_;
};

}  // namespace qat::train
