// Quantization-aware training of your own torch::nn::Module: a small CNN that reads digits, at 4 and at 2
// bits.
//
//   finetune_custom [digits.safetensors] [--small] [--out FOLDER]
//
// For each policy: the float network rounded to the grid (PTQ), and the same network after a few epochs that
// saw the grid (QAT). The QAT network is saved, read back into a fresh module, and scored again: the accuracy
// must be the same to the last digit, because forward saw exactly the numbers of the file.
//
// Without a file it draws digits itself. `python examples/mnist_to_safetensors.py out/mnist_5k.safetensors`
// makes a file of 5,000 real ones. --small: a few hundred pictures and epochs, for a test. The exit code is 0
// when QAT at 2 bits beats PTQ by at least 10 points.

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/randperm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <qat/qat.hpp>

#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <numbers>
#include <string>
#include <vector>

#include "digits.hpp"

namespace {

torch::nn::Conv2d conv(int64_t in, int64_t out, int64_t stride) {
  return torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).padding(1).stride(stride));
}

/// 28 x 28 -> 16 -> 32 -> 64 -> 128 channels at 14 x 14, 14 x 14, 7 x 7, 7 x 7 -> mean -> 10: 98,442 weights.
struct DigitNetImpl : torch::nn::Module {
  /// images: float32[B, 1, 28, 28] -> logits [B, 10].
  at::Tensor forward(const at::Tensor& images) {
    at::Tensor x = conv1(images).relu();
    x = conv2(x).relu();
    x = conv3(x).relu();
    x = conv4(x).relu();
    return head(x.mean({2, 3}));
  }

  torch::nn::Conv2d conv1 = register_module("conv1", conv(1, 16, 2));
  torch::nn::Conv2d conv2 = register_module("conv2", conv(16, 32, 1));
  torch::nn::Conv2d conv3 = register_module("conv3", conv(32, 64, 2));
  torch::nn::Conv2d conv4 = register_module("conv4", conv(64, 128, 1));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(128, 10));
};
TORCH_MODULE(DigitNet);

constexpr int64_t kEpochs = 4;
constexpr double kLeastGain = 10.0;  // points of accuracy at 2 bits

/// The policy without rules: everything stays float.
qat::Policy floats() {
  return qat::Policy::from_json(R"({"rules": []})");
}

struct Settings {
  std::string file;
  std::string folder = "out/finetune_custom";
  bool small = false;
};

/// Percent of `digits` read correctly, with the weights that `model` ships.
double accuracy(DigitNet& net, qat::PreparedModel& model, const Digits& digits) {
  const at::NoGradGuard no_grad;
  const auto quantized = model.quantized();
  const at::Tensor right = net->forward(digits.images).argmax(1).eq(digits.labels);
  return 100.0 * static_cast<double>(right.sum().item<int64_t>()) / static_cast<double>(digits.size());
}

/// An ordinary loop. The only line that knows of quantization is the scope around forward.
void train(DigitNet& net, qat::PreparedModel& model, const Digits& digits, int64_t epochs) {
  constexpr int64_t kBatch = 50;
  constexpr double kRate = 4e-3;
  torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(kRate));
  const int64_t batches = digits.size() / kBatch;
  at::Tensor order;
  for (int64_t step = 0; step < epochs * batches; ++step) {
    if (step % batches == 0) order = at::randperm(digits.size(), at::kLong);
    const double done = static_cast<double>(step) / static_cast<double>(epochs * batches);
    const double rate = kRate * 0.5 * (1.0 + std::cos(std::numbers::pi * done));
    static_cast<torch::optim::AdamOptions&>(optimizer.param_groups()[0].options()).lr(rate);

    const at::Tensor batch = order.slice(0, step % batches * kBatch, (step % batches + 1) * kBatch);
    optimizer.zero_grad();
    at::Tensor loss;
    {
      const auto quantized = model.quantized();
      loss = at::cross_entropy_loss(net->forward(digits.images.index_select(0, batch)),
                                    digits.labels.index_select(0, batch));
    }
    loss.backward();
    optimizer.step();
  }
}

DigitNet copy_of(const DigitNet& source) {
  const at::NoGradGuard no_grad;
  DigitNet copy;
  const auto from = source->named_parameters();
  for (auto& parameter : copy->named_parameters()) parameter.value().copy_(from[parameter.key()]);
  return copy;
}

/// A fresh network with the numbers of a checkpoint's file.
DigitNet read_back(const std::string& path) {
  const at::NoGradGuard no_grad;
  const qat::QuantizedCheckpoint checkpoint = qat::load(path);
  DigitNet net;
  for (auto& parameter : net->named_parameters()) {
    parameter.value().copy_(qat::weight_of(checkpoint, parameter.key()));
  }
  return net;
}

/// One line of the table: rounded only, trained on the grid, and read back from the file.
struct Outcome {
  double ptq, qat, file;
  std::string report;
};

Outcome run_policy(const std::string& name, const qat::Policy& policy, const DigitNet& trained,
                   const Digits& train_set, const Digits& test_set, const Settings& settings) {
  DigitNet net = copy_of(trained);
  qat::PreparedModel model = qat::prepare(net.ptr(), policy);
  Outcome outcome;
  outcome.ptq = accuracy(net, model, test_set);
  train(net, model, train_set, kEpochs);
  outcome.qat = accuracy(net, model, test_set);
  outcome.report = qat::to_string(model.report());

  const std::string path = settings.folder + "/" + name + ".qat.safetensors";
  qat::save(qat::freeze(model), path);
  DigitNet reread = read_back(path);
  qat::PreparedModel as_it_is = qat::prepare(reread.ptr(), floats());
  outcome.file = accuracy(reread, as_it_is, test_set);
  std::printf("%-14s %8.1f %8.1f %14.1f %10ju\n", name.c_str(), outcome.ptq, outcome.qat, outcome.file,
              static_cast<uintmax_t>(std::filesystem::file_size(path)));
  if (outcome.file != outcome.qat)
    throw qat::Error(path + ": expected the trained network's accuracy, got another");
  return outcome;
}

int run(const Settings& settings) {
  at::manual_seed(0);
  const int64_t wanted = settings.small ? 1250 : 5000;
  const Digits digits = settings.file.empty() ? draw_digits(wanted, 0) : read_digits(settings.file);
  const int64_t count = std::min(digits.size(), wanted);
  const Digits train_set = digits.slice(0, count * 4 / 5);
  const Digits test_set = digits.slice(count * 4 / 5, count);
  std::filesystem::create_directories(settings.folder);

  DigitNet net;
  qat::PreparedModel as_it_is = qat::prepare(net.ptr(), floats());
  train(net, as_it_is, train_set, settings.small ? 6 * kEpochs : 3 * kEpochs);
  std::printf("%s: %jd digits to train on, %jd to test; accuracy in %%\n\n",
              settings.file.empty() ? "drawn digits" : settings.file.c_str(),
              static_cast<intmax_t>(train_set.size()), static_cast<intmax_t>(test_set.size()));
  std::printf("%-14s %8s %8s %14s %10s\n", "policy", "PTQ", "QAT", "QAT from file", "bytes");
  // The control: the float network trained for as long as the quantized ones.
  run_policy("float", floats(), net, train_set, test_set, settings);
  Outcome last;
  for (const char* name : {"int4-channel", "int2-channel"}) {
    last = run_policy(name, qat::Policy::preset(name), net, train_set, test_set, settings);
  }
  std::printf("\nAt 2 bits QAT wins %.1f points:\n%s", last.qat - last.ptq, last.report.c_str());
  return last.qat - last.ptq >= kLeastGain ? 0 : 1;
}

Settings parse(const std::vector<std::string>& arguments) {
  Settings settings;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--small") {
      settings.small = true;
    } else if (arguments[i] == "--out" && i + 1 < arguments.size()) {
      settings.folder = arguments[++i];
    } else if (!arguments[i].starts_with("-") && settings.file.empty()) {
      settings.file = arguments[i];
    } else {
      throw qat::ArgumentError(
          "finetune_custom: expected [digits.safetensors] [--small] [--out FOLDER], got \"" + arguments[i] +
          "\"");
    }
  }
  return settings;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse({argv + 1, argv + argc}));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
