#include "models/attend.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>

#include <limits>

#include "catch.hpp"

using qat::models::attend;

namespace {

struct Case {
  int64_t queries, keys, window;
};

at::Tensor random(at::IntArrayRef shape, uint64_t seed) {
  return at::randn(shape, at::make_generator<at::CPUGeneratorImpl>(seed), at::kDouble);
}

/// The definition, with the whole mask: query i of the last T positions reads the keys j with 0 <= i - j <
/// window.
at::Tensor defined(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t window,
                   double scale) {
  const int64_t queries = q.size(2), keys = k.size(2), repeat = q.size(1) / k.size(1);
  const at::Tensor distance = at::arange(keys - queries, keys).unsqueeze(1) - at::arange(keys);
  at::Tensor hidden = distance < 0;
  if (window > 0) hidden = hidden.logical_or(distance >= window);
  const at::Tensor products = at::matmul(q, k.repeat_interleave(repeat, 1).transpose(2, 3)) * scale;
  const at::Tensor masked = products.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  return at::matmul(at::softmax(masked, -1), v.repeat_interleave(repeat, 1));
}

const std::vector<Case> kCases = {{9, 9, 0}, {9, 9, 9}, {9, 9, 20}, {9, 9, 8},  {9, 9, 4},
                                  {9, 9, 3}, {9, 9, 1}, {1, 9, 0},  {1, 9, 4},  {1, 1, 3},
                                  {4, 9, 0}, {4, 9, 3}, {4, 9, 50}, {16, 16, 4}};

}  // namespace

TEST_CASE("attention in windows is the definition with its whole mask, and so are its gradients") {
  for (const Case& c : kCases) {
    const at::Tensor weights = random({2, 4, c.queries, 8}, 4);
    std::vector<at::Tensor> results[2];
    for (const bool reference : {false, true}) {
      std::vector<at::Tensor> in = {random({2, 4, c.queries, 8}, 1), random({2, 2, c.keys, 8}, 2),
                                    random({2, 2, c.keys, 8}, 3)};
      for (at::Tensor& tensor : in) tensor.requires_grad_();
      const at::Tensor y = reference ? defined(in[0], in[1], in[2], c.window, 0.7)
                                     : attend(in[0], in[1], in[2], c.window, 0.7);
      (y * weights).sum().backward();
      results[reference] = {y.detach(), in[0].grad(), in[1].grad(), in[2].grad()};
    }
    for (size_t i = 0; i < 4; ++i) {
      INFO(c.queries << " queries, " << c.keys << " keys, window " << c.window << ", result " << i);
      // float64 sums of at most 16 terms in another order.
      CHECK((results[0][i] - results[1][i]).abs().max().item<double>() < 1e-12);
    }
  }
}
