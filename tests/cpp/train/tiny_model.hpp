#pragma once

// A language model small enough to follow by hand: embedding, one hidden layer, head.

#include <ATen/Context.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/tanh.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <c10/core/GradMode.h>

#include <memory>
#include <optional>
#include <string>

#include "qat/eval/eval.hpp"
#include "qat/policy/policy.hpp"
#include "qat/prepare/prepare.hpp"
#include "qat/quantizer/head.hpp"
#include "qat/train/token_data.hpp"

constexpr int64_t kTinyVocabulary = 17;
constexpr int64_t kTinyWidth = 32;

struct TinyModelImpl : torch::nn::Module {
  explicit TinyModelImpl(double dropout = 0)
      : embed(register_module("embed", torch::nn::Embedding(kTinyVocabulary, kTinyWidth))),
        up(register_module("up", torch::nn::Linear(kTinyWidth, kTinyWidth))),
        drop(register_module("drop", torch::nn::Dropout(dropout))),
        head(register_module("head", torch::nn::Linear(kTinyWidth, kTinyVocabulary))) {}

  at::Tensor forward(const at::Tensor& tokens) { return head(hidden(tokens)); }
  at::Tensor hidden(const at::Tensor& tokens) { return drop(at::tanh(up(embed(tokens)))); }
  /// What the head's members are now: inside a QuantizedScope, the quantized weight.
  qat::Head output_head() { return {head->weight, head->bias}; }

  torch::nn::Embedding embed;
  torch::nn::Linear up;
  torch::nn::Dropout drop;
  torch::nn::Linear head;
};

/// Two-bit channels: coarse enough that quantization hurts and codes flip.
inline qat::Policy tiny_policy() {
  return qat::Policy::from_json(R"({"rules": [{"match": "up|head", "weight": "int2_channel"}]})");
}

/// The same with learned scales.
inline qat::Policy tiny_learned_policy() {
  return qat::Policy::from_json(
      R"({"rules": [{"match": "up|head", "weight": "int2_channel"}], "estimator": {"kind": "lsq"}})");
}

/// A student with the teacher's weights, prepared, and both as functions.
struct TinySetup {
  explicit TinySetup(double dropout = 0, const qat::Policy& policy = tiny_policy()) {
    at::manual_seed(5);
    teacher = std::make_shared<TinyModelImpl>();
    at::manual_seed(5);
    student = std::make_shared<TinyModelImpl>(dropout);
    for (const auto& net : {teacher, student}) {
      const c10::NoGradGuard no_grad;
      net->head->weight.mul_(5);  // logits that differ from one another, so that there is something to lose
    }
    model.emplace(qat::prepare(student, policy));
  }

  qat::eval::LogitsFunction student_function() const {
    return [net = student](const at::Tensor& tokens) { return net->forward(tokens); };
  }
  qat::eval::LogitsFunction teacher_function() const {
    return [net = teacher](const at::Tensor& tokens) { return net->forward(tokens); };
  }

  std::shared_ptr<TinyModelImpl> teacher, student;
  std::optional<qat::PreparedModel> model;
};

/// Text in which a token mostly follows from the one before.
inline at::Tensor tiny_tokens(int64_t count) {
  at::manual_seed(9);
  const at::Tensor noise = at::randint(3, {count}, at::TensorOptions(at::kLong));
  at::Tensor tokens = at::empty({count}, at::TensorOptions(at::kLong));
  int64_t token = 1;
  for (int64_t i = 0; i < count; ++i) {
    token = (token * 5 + 1 + noise[i].item<int64_t>()) % kTinyVocabulary;
    tokens[i] = token;
  }
  return tokens;
}
