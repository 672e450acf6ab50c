#include "qat/models/generate.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorIndexing.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <string>

#include "qat/core/error.hpp"
#include "qat/ops/sample.hpp"

namespace qat::models {
namespace {

at::TensorOptions ids() {
  return at::TensorOptions(at::kLong);
}

void check(int64_t count, int64_t window, const at::Tensor& first, const GenerateOptions& options) {
  if (count >= 1 && window >= 1 && first.numel() >= 1 && options.sequences >= 1) return;
  throw ArgumentError(
      "generate: expected at least one text, token and id to begin with, and one at a time, got " +
      std::to_string(count) + " texts of " + std::to_string(window) + " tokens that begin with one of " +
      std::to_string(first.numel()) + ", " + std::to_string(options.sequences) + " at a time");
}

/// Texts whose keys and values fit in the memory allowed, as those of one token show.
int64_t at_once(Decoder& decoder, int64_t window, const GenerateOptions& options) {
  KvCache cache(decoder.config());
  decoder.forward(at::zeros({1, 1}, ids()), cache);
  const int64_t each = std::max<int64_t>(1, cache.bytes() * window);
  return std::clamp<int64_t>(options.cache_bytes / each, 1, options.sequences);
}

/// Tokens given before the model writes: the first ones, behind `beginning` if there is one.
int64_t begin(const at::Tensor& texts, const at::Tensor& first, const std::optional<int64_t>& beginning,
              const at::Generator& generator) {
  const at::Tensor drawn = first.index({at::randint(first.numel(), {texts.size(0)}, generator, ids())});
  if (!beginning || texts.size(1) == 1) {
    texts.select(1, 0).copy_(drawn);
    if (beginning) texts.fill_(*beginning);
    return 1;
  }
  texts.select(1, 0).fill_(*beginning);
  texts.select(1, 1).copy_(drawn);
  return 2;
}

}  // namespace

at::Tensor generate(Decoder& decoder, int64_t count, int64_t window, const at::Tensor& first,
                    const GenerateOptions& options) {
  check(count, window, first, options);
  const at::NoGradGuard no_grad;
  const at::Generator generator = at::detail::createCPUGenerator(static_cast<uint64_t>(options.seed));
  const at::Tensor texts = at::empty({count, window}, ids());
  const int64_t given = begin(texts, first, options.beginning, generator);
  int64_t done = 0;
  for (const at::Tensor& part : texts.split(at_once(decoder, window, options))) {
    KvCache cache(decoder.config());
    at::Tensor prompt = part.narrow(1, 0, given);
    for (int64_t at = given; at < window; ++at) {
      const at::Tensor uniform = at::rand({part.size(0)}, generator, at::TensorOptions(at::kDouble));
      part.select(1, at).copy_(sample(decoder.forward(prompt, cache).select(1, -1), uniform));
      prompt = part.narrow(1, at, 1);
      if (options.progress) options.progress(done + part.size(0) * (at + 1), texts.numel());
    }
    done += part.numel();
  }
  return texts;
}

at::Tensor mixed(const std::vector<at::Tensor>& parts, int64_t seed) {
  if (parts.size() == 1) return parts.front();
  const at::Tensor windows = at::cat(parts);
  const at::Generator generator = at::detail::createCPUGenerator(static_cast<uint64_t>(seed));
  return windows.index({at::randperm(windows.size(0), generator, ids())});
}

}  // namespace qat::models
