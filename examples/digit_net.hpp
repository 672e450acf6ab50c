#pragma once

// The network of finetune_custom.cpp: an ordinary torch::nn::Module with the layers that people have.

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <string>
#include <utility>
#include <vector>

/// A convolution (depthwise when `groups` is `in`), then BatchNorm, then ReLU6.
struct ConvNormImpl : torch::nn::Module {
  ConvNormImpl(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t groups = 1)
      : conv(register_module("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, kernel)
                                                           .stride(stride)
                                                           .padding(kernel / 2)
                                                           .groups(groups)
                                                           .bias(false)))),
        norm(register_module("norm", torch::nn::BatchNorm2d(out))) {}

  at::Tensor forward(const at::Tensor& x) { return norm(conv(x)).clamp(0, 6); }

  torch::nn::Conv2d conv;
  torch::nn::BatchNorm2d norm;
};
TORCH_MODULE(ConvNorm);

/// 28 x 28 -> 24 channels at 14 x 14 -> two depthwise-separable blocks, 48 at 14 x 14 and 96 at 7 x 7 -> mean
/// -> LayerNorm -> Linear with bias -> 10.
struct DigitNetImpl : torch::nn::Module {
  DigitNetImpl() = default;

  /// images: float32[B, 1, 28, 28] -> logits [B, 10].
  at::Tensor forward(const at::Tensor& images) {
    at::Tensor x = stem(images);
    x = pointwise1(depthwise1(x));
    x = pointwise2(depthwise2(x));
    return head(norm(x.mean({2, 3})));
  }

  ConvNorm stem = register_module("stem", ConvNorm(1, 24, 3, 2));
  ConvNorm depthwise1 = register_module("depthwise1", ConvNorm(24, 24, 3, 1, 24));
  ConvNorm pointwise1 = register_module("pointwise1", ConvNorm(24, 48, 1, 1));
  ConvNorm depthwise2 = register_module("depthwise2", ConvNorm(48, 48, 3, 2, 48));
  ConvNorm pointwise2 = register_module("pointwise2", ConvNorm(48, 96, 1, 1));
  torch::nn::LayerNorm norm =
      register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({96})));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(96, 10));
};
TORCH_MODULE(DigitNet);

/// (layer, BatchNorm behind it) by path. LibTorch cannot trace a forward, so the module's author says it.
inline std::vector<std::pair<std::string, std::string>> folding_pairs() {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const char* block : {"stem", "depthwise1", "pointwise1", "depthwise2", "pointwise2"}) {
    pairs.emplace_back(std::string(block) + ".conv", std::string(block) + ".norm");
  }
  return pairs;
}
