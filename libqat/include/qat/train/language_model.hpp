#pragma once

// A language model as training calls it: tokens -> logits, or in the two halves that spare the logits.

#include <ATen/core/Tensor.h>

#include <concepts>
#include <functional>
#include <memory>
#include <utility>

#include "qat/eval/eval.hpp"
#include "qat/quantizer/head.hpp"

namespace qat::train {

/// Either `logits`, or `hidden` and `head`, or nothing. Converts from any function tokens -> logits.
struct LanguageModel {
  LanguageModel() = default;
  template <class Function>
    requires std::constructible_from<eval::LogitsFunction, Function>
  LanguageModel(Function function) : logits(std::move(function)) {}
  LanguageModel(std::function<at::Tensor(const at::Tensor&)> hidden_states, std::function<Head()> output_head)
      : hidden(std::move(hidden_states)), head(std::move(output_head)) {}

  /// tokens: int64[B, T] -> logits [B, T, V].
  eval::LogitsFunction logits;
  /// tokens: int64[B, T] -> [B, T, h]; `head` gives the layer that makes logits of it.
  std::function<at::Tensor(const at::Tensor&)> hidden;
  std::function<Head()> head;

  bool in_halves() const noexcept { return hidden && head; }
  explicit operator bool() const noexcept { return logits || in_halves(); }
  /// tokens -> logits, whichever form the model has.
  at::Tensor operator()(const at::Tensor& tokens) const {
    return in_halves() ? head().logits(hidden(tokens)) : logits(tokens);
  }
};

/// The halves of a module that has `hidden(tokens)` and `output_head()`, as models::Decoder does.
template <class Module>
LanguageModel in_halves(std::shared_ptr<Module> module) {
  return {[module](const at::Tensor& tokens) { return module->hidden(tokens); },
          [module] { return module->output_head(); }};
}

}  // namespace qat::train
