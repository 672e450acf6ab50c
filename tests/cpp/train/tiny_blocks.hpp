#pragma once

#include <torch/nn/modules/container/modulelist.h>

#include "train/tiny_model.hpp"

/// Three residual blocks, "layers.0" to "layers.2", between an embedding and a head.
struct TinyBlocksImpl : torch::nn::Module {
  TinyBlocksImpl()
      : embed(register_module("embed", torch::nn::Embedding(kTinyVocabulary, kTinyWidth))),
        layers(register_module("layers", torch::nn::ModuleList())),
        head(register_module("head", torch::nn::Linear(kTinyWidth, kTinyVocabulary))) {
    for (int i = 0; i < 3; ++i) layers->push_back(torch::nn::Linear(kTinyWidth, kTinyWidth));
  }

  at::Tensor forward(const at::Tensor& tokens) {
    at::Tensor hidden = embed(tokens);
    for (const auto& layer : *layers)
      hidden = hidden + at::tanh(layer->as<torch::nn::Linear>()->forward(hidden));
    return head(hidden);
  }
  at::Tensor weight(std::size_t block) { return layers[block]->as<torch::nn::Linear>()->weight; }

  torch::nn::Embedding embed;
  torch::nn::ModuleList layers;
  torch::nn::Linear head;
};

/// A student with the teacher's weights, blocks and head prepared in two bits with learned scales.
struct BlocksSetup {
  explicit BlocksSetup(const qat::Policy& policy = qat::Policy::from_json(R"({"rules": [
      {"match": "head|layers.*", "weight": "int2_channel"}], "estimator": {"kind": "lsq"}})")) {
    at::manual_seed(5);
    teacher = std::make_shared<TinyBlocksImpl>();
    at::manual_seed(5);
    student = std::make_shared<TinyBlocksImpl>();
    for (const auto& net : {teacher, student}) {
      const c10::NoGradGuard no_grad;
      net->head->weight.mul_(5);
    }
    model.emplace(qat::prepare(student, policy));
  }

  qat::eval::LogitsFunction student_function() const {
    return [net = student](const at::Tensor& tokens) { return net->forward(tokens); };
  }
  qat::eval::LogitsFunction teacher_function() const {
    return [net = teacher](const at::Tensor& tokens) { return net->forward(tokens); };
  }

  std::shared_ptr<TinyBlocksImpl> teacher, student;
  std::optional<qat::PreparedModel> model;
};
