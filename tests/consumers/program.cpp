// What somebody else's project does with libqat: trains a small net of its own on a grid, ships it, reads it
// back, and runs a language model. Built against an installed libqat, against the wheel, and as a subfolder.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <qat/models/decoder.hpp>
#include <qat/qat.hpp>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

namespace {

struct NetImpl : torch::nn::Module {
  at::Tensor forward(const at::Tensor& x) { return out(in(x).tanh()); }

  torch::nn::Linear in = register_module("in", torch::nn::Linear(32, 64));
  torch::nn::Linear out = register_module("out", torch::nn::Linear(64, 1));
};
TORCH_MODULE(Net);

[[noreturn]] void fail(const std::string& what) {
  throw qat::Error("consumer: " + what);
}

/// Mean squared error with the numbers that ship, as they stand after `steps` more steps on the grid.
double train(Net& net, qat::PreparedModel& model, const at::Tensor& x, const at::Tensor& y, int steps) {
  torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(1e-2));
  at::Tensor loss;
  for (int step = 0; step <= steps; ++step) {
    {
      const auto quantized = model.quantized();
      loss = at::mse_loss(net->forward(x), y);
    }
    if (step == steps) break;
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
  }
  return loss.item<double>();
}

/// Trains, saves, loads into a fresh net, and compares outputs bit for bit.
void ship_a_net(const std::string& path) {
  const at::Tensor x = at::randn({64, 32});
  const at::Tensor y = x.narrow(1, 0, 8).sum(1, true);
  Net net;
  qat::PreparedModel model = qat::prepare(net.ptr(), qat::Policy::preset("int4-channel"));
  const double before = train(net, model, x, y, 0);
  const double after = train(net, model, x, y, 60);
  if (after > 0.5 * before) fail("training did not halve the error");
  qat::save(qat::freeze(model), path);

  const at::NoGradGuard no_grad;
  const qat::QuantizedCheckpoint shipped = qat::load(path);
  Net fresh;
  for (auto& parameter : fresh->named_parameters()) {
    parameter.value().copy_(qat::weight_of(shipped, parameter.key()));
  }
  const auto quantized = model.quantized();
  if (!at::equal(fresh->forward(x), net->forward(x))) fail(path + " does not hold the trained numbers");
  std::printf("error %.4f -> %.4f at 4 bits, the same from %s\n", before, after, path.c_str());
}

void run_a_decoder() {
  qat::models::DecoderConfig config;
  config.vocab_size = 96;
  config.hidden_size = 32;
  config.intermediate_size = 64;
  config.num_hidden_layers = 1;
  config.num_attention_heads = config.num_key_value_heads = 2;
  config.head_dim = 16;
  qat::models::Decoder decoder(config);
  const at::Tensor logits = decoder.forward(at::randint(config.vocab_size, {2, 5}, at::kLong));
  if (logits.sizes() != at::IntArrayRef({2, 5, 96})) fail("the decoder's logits have another shape");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    // A program that finds another library at run time than it was compiled for should notice.
    if (std::strcmp(qat::version(), QAT_VERSION) != 0) fail("headers and library differ in version");
    at::manual_seed(0);
    ship_a_net(argc > 1 ? argv[1] : "net.qat.safetensors");
    run_a_decoder();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
