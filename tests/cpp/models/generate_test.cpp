#include "qat/models/generate.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/isin.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/unique_dim.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "shapes_of_models.hpp"

using namespace qat;
using models::GenerateOptions;

namespace {

at::Tensor first() {
  return at::tensor({5, 7, 11}, at::kLong);
}

models::Decoder decoder() {
  at::manual_seed(3);
  return models::Decoder(models::llama());
}

}  // namespace

TEST_CASE("texts follow the seed and begin as they are told") {
  models::Decoder model = decoder();
  const at::Tensor texts = models::generate(model, 6, 12, first(), {.seed = 3});
  CHECK(texts.sizes() == at::IntArrayRef({6, 12}));
  CHECK(at::isin(texts.select(1, 0), first()).all().item<bool>());
  CHECK(at::equal(texts, models::generate(model, 6, 12, first(), {.seed = 3})));
  CHECK_FALSE(at::equal(texts, models::generate(model, 6, 12, first(), {.seed = 4})));
  const at::Tensor begun = models::generate(model, 6, 12, first(), {.beginning = 1, .seed = 3});
  CHECK((begun.select(1, 0) == 1).all().item<bool>());
  CHECK(at::equal(begun.select(1, 1), texts.select(1, 0)));
  CHECK(models::generate(model, 2, 1, first(), {.beginning = 1}).eq(1).all().item<bool>());
}

TEST_CASE("texts that do not fit in memory together are written in parts") {
  models::Decoder model = decoder();
  {
    const at::NoGradGuard no_grad;
    model.named_parameters()["model.norm.weight"].mul_(1e-3);  // any token next: no two texts alike
  }
  for (const GenerateOptions& limits : {GenerateOptions{.sequences = 4}, GenerateOptions{.cache_bytes = 1}}) {
    GenerateOptions options = limits;
    std::vector<std::pair<int64_t, int64_t>> seen;
    options.progress = [&](int64_t done, int64_t total) { seen.emplace_back(done, total); };
    const at::Tensor texts = models::generate(model, 10, 5, first(), options);
    CHECK(std::get<0>(at::unique_dim(texts, 0)).size(0) == 10);
    CHECK(std::is_sorted(seen.begin(), seen.end()));
    CHECK(seen.back() == std::pair<int64_t, int64_t>(50, 50));
    CHECK(seen.size() == (limits.cache_bytes == 1 ? 40 : 12));  // one call per token of each part
  }
}

TEST_CASE("a model that is sure of its next token writes what it says, with the cache as without") {
  models::Decoder model = decoder();
  const at::NoGradGuard no_grad;
  model.named_parameters()["model.norm.weight"].mul_(1e4);
  const at::Tensor texts = models::generate(model, 4, 20, first());
  CHECK(at::equal(model.forward(texts).narrow(1, 0, 19).argmax(-1), texts.narrow(1, 1, 19)));
}

TEST_CASE("nothing to write is refused") {
  models::Decoder model = decoder();
  CHECK_THROWS_AS(models::generate(model, 0, 4, first()), ArgumentError);
  CHECK_THROWS_AS(models::generate(model, 1, 0, first()), ArgumentError);
  CHECK_THROWS_AS(models::generate(model, 1, 4, first().narrow(0, 0, 0)), ArgumentError);
  CHECK_THROWS_AS(models::generate(model, 1, 4, first(), {.sequences = 0}), ArgumentError);
}

TEST_CASE("windows of several sources are all there, in another order") {
  const at::Tensor a = at::arange(12).view({6, 2}), b = at::arange(100, 106).view({3, 2});
  const at::Tensor windows = models::mixed({a, b}, 1);
  const at::Tensor expected = at::arange(12).view({6, 2});
  CHECK_FALSE(at::equal(windows.narrow(0, 0, 6), a));
  const at::Tensor order = windows.select(1, 0).argsort();
  CHECK(at::equal(windows.index({order}).narrow(0, 0, 6), expected));
  CHECK(at::equal(windows.index({order}).narrow(0, 6, 3), b));
  CHECK(models::mixed({a}, 1).is_same(a));
}
