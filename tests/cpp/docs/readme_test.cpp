// The C++ snippet of the README, compiled and run as it stands there (tests/python/test_docs.py compares the
// text).

#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>

#include <filesystem>

#include "qat/qat.hpp"
//
#include "catch.hpp"

TEST_CASE("the README's C++ example trains on the grid and saves") {
  torch::manual_seed(0);
  torch::nn::Sequential net(torch::nn::Linear(8, 16), torch::nn::ReLU(), torch::nn::Linear(16, 3));
  torch::optim::AdamW optimizer(net->parameters(), 1e-2);
  const auto images = torch::randn({32, 8});
  const auto labels = torch::randint(3, {32}, torch::kLong);
  const int64_t steps = 3;
  const auto folder = std::filesystem::temp_directory_path() / "libqat-readme-test";
  std::filesystem::create_directories(folder);
  std::filesystem::current_path(folder);

  auto model = qat::prepare(net.ptr(), qat::Policy::preset("int4-channel"));
  for (int64_t step = 0; step < steps; ++step) {
    auto quantized = model.quantized();  // while it lives, forward sees the grid
    auto loss = torch::nn::functional::cross_entropy(net->forward(images), labels);
    loss.backward();
    optimizer.step();
    optimizer.zero_grad();
  }
  qat::save(qat::freeze(model), "net.qat.safetensors");

  const auto checkpoint = qat::load("net.qat.safetensors");
  REQUIRE(checkpoint.quantized.size() == 2);
  const auto quantized = model.quantized();
  REQUIRE(qat::weight_of(checkpoint, "0.weight").equal(net[0]->as<torch::nn::Linear>()->weight.detach()));
}
