// Quantization-aware training of your own torch::nn::Module: a small network that reads digits, at 4 bits, at
// 2 bits, and at 8 and 2 mixed. It has what such networks have: depthwise convolutions, BatchNorm, LayerNorm,
// a bias.
//
//   finetune_custom [digits.safetensors] [--weights FILE] [--batch-norm fold|freeze] [--small] [--out FOLDER]
//
// For each policy: the float network rounded to the grid (PTQ), and the same network after a few epochs that
// saw the grid (QAT). The QAT network is saved, read back into a fresh module, and scored again: the accuracy
// must be the same to the last digit, because forward saw exactly the numbers of the file.
//
// Without a file it draws digits itself. `python examples/mnist_to_safetensors.py out/mnist_5k.safetensors`
// makes a file of 5,000 real ones. --weights: start from float weights trained elsewhere, for instance in
// Python
// (`safetensors.torch.save_file(net.state_dict(), FILE)` of a module with the same names). --batch-norm: fold
// each BatchNorm into its convolution before training on the grid (the default), or keep it with frozen
// statistics.
// --small: a few hundred pictures and epochs, for a test. The exit code is 0 when QAT at 2 bits beats PTQ by
// at least 10 points.

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/randperm.h>
#include <torch/optim/adam.h>
#include <qat/qat.hpp>

#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <numbers>
#include <string>
#include <vector>

#include "digit_net.hpp"
#include "digits.hpp"

namespace {

constexpr int64_t kEpochs = 4;
constexpr double kLeastGain = 10.0;  // points of accuracy at 2 bits

/// First match wins. The few weights of the stem and of the depthwise convolutions are worth 8 bits.
constexpr const char* kMixed = R"({"rules": [
  {"match": "stem\\.conv|depthwise\\d\\.conv", "weight": "int8_channel"},
  {"match": "pointwise\\d\\.conv|head", "weight": "int2_channel"}]})";

/// The policy without rules: everything stays float.
qat::Policy floats() {
  return qat::Policy::from_json(R"({"rules": []})");
}

struct Settings {
  std::string file;
  std::string weights;
  std::string folder = "out/finetune_custom";
  bool fold = true;
  bool small = false;
};

/// Percent of `digits` read correctly, with the weights that `model` ships.
double accuracy(DigitNet& net, qat::PreparedModel& model, const Digits& digits) {
  const at::NoGradGuard no_grad;
  net->eval();
  const auto quantized = model.quantized();
  const at::Tensor right = net->forward(digits.images).argmax(1).eq(digits.labels);
  return 100.0 * static_cast<double>(right.sum().item<int64_t>()) / static_cast<double>(digits.size());
}

enum class BatchNorm { kTrains, kFrozen };

/// An ordinary loop. The only line that knows of quantization is the scope around forward.
void train(DigitNet& net, qat::PreparedModel& model, const Digits& digits, int64_t epochs,
           BatchNorm batch_norm) {
  constexpr int64_t kBatch = 50;
  constexpr double kRate = 4e-3;
  net->train();
  if (batch_norm == BatchNorm::kFrozen) qat::freeze_batch_norm(*net);
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

/// A new network, folded when the settings say so: its names are then those of a folded network's file.
DigitNet fresh(const Settings& settings) {
  DigitNet net;
  if (settings.fold) {
    for (const auto& [layer, norm] : folding_pairs()) qat::fold_batch_norm(*net, layer, norm);
  }
  return net;
}

/// The float network: trained here, or with weights from elsewhere. Writes the file that every policy starts
/// from.
std::string float_weights(const Digits& digits, const Settings& settings) {
  DigitNet net;
  if (settings.weights.empty()) {
    qat::PreparedModel as_it_is = qat::prepare(net.ptr(), floats());
    train(net, as_it_is, digits, settings.small ? 6 * kEpochs : 3 * kEpochs, BatchNorm::kTrains);
  } else {
    qat::load_state(*net, settings.weights);
  }
  if (settings.fold) {
    for (const auto& [layer, norm] : folding_pairs()) qat::fold_batch_norm(*net, layer, norm);
  }
  const std::string path = settings.folder + "/float.safetensors";
  qat::save_state(*net, path);
  return path;
}

/// One line of the table: rounded only, trained on the grid, and read back from the file.
struct Outcome {
  double ptq, qat, file;
  std::string report;
};

Outcome run_policy(const std::string& name, const qat::Policy& policy, const std::string& weights,
                   const Digits& train_set, const Digits& test_set, const Settings& settings) {
  DigitNet net = fresh(settings);
  qat::load_state(*net, weights);
  qat::PreparedModel model = qat::prepare(net.ptr(), policy);
  Outcome outcome;
  outcome.ptq = accuracy(net, model, test_set);
  train(net, model, train_set, kEpochs, BatchNorm::kFrozen);
  outcome.qat = accuracy(net, model, test_set);
  outcome.report = qat::to_string(model.report());

  const std::string path = settings.folder + "/" + name + ".qat.safetensors";
  qat::save(qat::freeze(model), path);
  DigitNet reread = fresh(settings);
  qat::load_state(*reread, path);
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

  const std::string weights = float_weights(train_set, settings);
  std::printf("%s: %jd digits to train on, %jd to test; BatchNorm %s; accuracy in %%\n\n",
              settings.file.empty() ? "drawn digits" : settings.file.c_str(),
              static_cast<intmax_t>(train_set.size()), static_cast<intmax_t>(test_set.size()),
              settings.fold ? "folded" : "frozen");
  std::printf("%-14s %8s %8s %14s %10s\n", "policy", "PTQ", "QAT", "QAT from file", "bytes");
  // The control: the float network trained for as long as the quantized ones.
  run_policy("float", floats(), weights, train_set, test_set, settings);
  run_policy("int4-channel", qat::Policy::preset("int4-channel"), weights, train_set, test_set, settings);
  run_policy("mixed-8-2", qat::Policy::from_json(kMixed), weights, train_set, test_set, settings);
  const Outcome last =
      run_policy("int2-channel", qat::Policy::preset("int2-channel"), weights, train_set, test_set, settings);
  std::printf("\nAt 2 bits QAT wins %.1f points:\n%s", last.qat - last.ptq, last.report.c_str());
  return last.qat - last.ptq >= kLeastGain ? 0 : 1;
}

constexpr const char* kUsage =
    "[digits.safetensors] [--weights FILE] [--batch-norm fold|freeze] [--small] [--out FOLDER]";

Settings parse(const std::vector<std::string>& arguments) {
  Settings settings;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const std::string value = i + 1 < arguments.size() ? arguments[i + 1] : "";
    const bool takes_value = argument == "--out" || argument == "--weights" || argument == "--batch-norm";
    if (argument == "--small") {
      settings.small = true;
    } else if (argument == "--out" && !value.empty()) {
      settings.folder = value;
    } else if (argument == "--weights" && !value.empty()) {
      settings.weights = value;
    } else if (argument == "--batch-norm" && (value == "fold" || value == "freeze")) {
      settings.fold = value == "fold";
    } else if (!argument.starts_with("-") && settings.file.empty()) {
      settings.file = argument;
    } else {
      throw qat::ArgumentError("finetune_custom: expected " + std::string(kUsage) + ", got \"" + argument +
                               "\"");
    }
    if (takes_value) ++i;
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
