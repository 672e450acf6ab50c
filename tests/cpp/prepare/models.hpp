#pragma once

// Small models that the tests of this folder attach policies to.

#include <ATen/Context.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include "qat/prepare/prepare.hpp"

namespace qat::test {

/// conv 2-4 (3 x 3) -> batch norm -> linear, as a user writes it.
struct ConvNetImpl : torch::nn::Module {
  ConvNetImpl()
      : conv(register_module("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 4, 3).bias(false)))),
        norm(register_module("norm", torch::nn::BatchNorm2d(4))),
        fc(register_module("fc", torch::nn::Linear(64, 3))) {}
  /// x: float32[B, 2, 6, 6] -> [B, 3].
  at::Tensor forward(const at::Tensor& x) { return fc(norm(conv(x)).relu().flatten(1)); }

  torch::nn::Conv2d conv;
  torch::nn::BatchNorm2d norm;
  torch::nn::Linear fc;
};
TORCH_MODULE(ConvNet);

/// embedding -> linear -> head, whose weight may be the embedding's.
struct TiedImpl : torch::nn::Module {
  explicit TiedImpl(bool tied)
      : embed(register_module("embed", torch::nn::Embedding(10, 32))),
        up(register_module("up", torch::nn::Linear(torch::nn::LinearOptions(32, 32).bias(false)))),
        head(register_module("head", torch::nn::Linear(torch::nn::LinearOptions(32, 10).bias(false)))) {
    if (tied) head->weight = embed->weight;
  }
  /// tokens: int64[T] -> [T, 10].
  at::Tensor forward(const at::Tensor& tokens) { return head(up(embed(tokens))); }

  torch::nn::Embedding embed;
  torch::nn::Linear up, head;
};
TORCH_MODULE(Tied);

inline Policy all(const std::string& grid, const std::string& estimator = "ste") {
  return Policy::from_json(R"({"rules": [{"match": ".*", "weight": ")" + grid +
                           R"("}], "estimator": {"kind": ")" + estimator + "\"}}");
}

}  // namespace qat::test
