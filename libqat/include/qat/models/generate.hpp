#pragma once

// Text that a model writes itself, for what has to know the model beyond one text: the starts of a run.
//
// A method that rounds by calibration text fits that text's noise as well, and knows nothing of others.
// Samples from the float model's own distribution cost no data and cover what it was trained on (LLM-QAT,
// Liu et al. 2023, arXiv:2305.17888, section 3.1).

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "qat/models/decoder.hpp"

namespace qat::models {

/// Settings of `generate`; Python uses the same names.
struct GenerateOptions {
  std::optional<int64_t> beginning = {};  ///< a token that stands before each text's first one
  int64_t seed = 0;
  int64_t sequences = 200;                 ///< at most at a time: the weights are read once for all of them
  int64_t cache_bytes = int64_t{1} << 30;  ///< that their keys and values may take together
  /// Called with tokens written, of how many. What it throws ends the work.
  std::function<void(int64_t done, int64_t total)> progress = {};
};

/// `count` texts of `window` tokens, int64[count, window], each a sample at temperature 1.
///
/// first: int64[n], ids of which each text's first token is drawn evenly, so that the texts are not all of
/// the likeliest kind. The same seed gives the same text where the logits are the same bits. Computes in
/// autocast's dtype or the decoder's own, without gradients. ArgumentError unless count, window, `sequences`
/// and the ids in `first` are at least one; NumericError for logits that are not finite.
at::Tensor generate(Decoder& decoder, int64_t count, int64_t window, const at::Tensor& first,
                    const GenerateOptions& options = {});

/// Windows of several sources, each int64[n, T], in one order without a pattern, so that each batch has some
/// of all. A single source stays as it is.
at::Tensor mixed(const std::vector<at::Tensor>& parts, int64_t seed);

}  // namespace qat::models
