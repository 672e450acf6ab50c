// The C++ of README.md, as it stands there.

#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <torch/nn/functional/loss.h>
#include <torch/optim/adam.h>
#include <unistd.h>

#include <filesystem>

#include "models.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

/// The current folder for the length of a test, removed afterwards.
struct OwnFolder {
  OwnFolder() : before(std::filesystem::current_path()) {
    path = std::filesystem::temp_directory_path() / ("qat_readme_" + std::to_string(::getpid()));
    std::filesystem::create_directories(path);
    std::filesystem::current_path(path);
  }
  ~OwnFolder() {
    std::filesystem::current_path(before);
    std::filesystem::remove_all(path);
  }
  std::filesystem::path before, path;
};

void fine_tune(std::shared_ptr<qat::test::ConvNetImpl> net, torch::optim::Optimizer& optimizer,
               const at::Tensor& images, const at::Tensor& labels, int64_t steps) {
  auto model = qat::prepare(net, qat::Policy::preset("int4-channel"));
  for (int64_t step = 0; step < steps; ++step) {
    auto quantized = model.quantized();  // while it lives, forward sees the grid; gradients reach the latents
    auto loss = torch::nn::functional::cross_entropy(net->forward(images), labels);
    loss.backward();
    optimizer.step();
    optimizer.zero_grad();
  }
  qat::save(qat::freeze(model), "net.qat.safetensors");
}

}  // namespace

TEST_CASE("the loop of the README trains the latents and ships them") {
  const OwnFolder folder;
  at::manual_seed(7);
  qat::test::ConvNet net;
  torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(1e-2));
  const at::Tensor before = net->conv->weight.detach().clone();
  const at::Tensor images = at::randn({30, 2, 6, 6});
  const at::Tensor labels = at::randint(3, {30}, at::kLong);
  const auto loss = [&] {
    return torch::nn::functional::cross_entropy(net->forward(images), labels).item<double>();
  };
  const double first = loss();
  fine_tune(net.ptr(), optimizer, images, labels, 40);
  REQUIRE_FALSE(at::equal(net->conv->weight, before));
  REQUIRE(loss() < 0.5 * first);  // 30 pictures are few: forty steps learn them by heart

  const auto checkpoint = qat::load("net.qat.safetensors");
  REQUIRE(checkpoint.quantized.at("conv.weight").scheme.weight == "int4_channel");
  REQUIRE(checkpoint.policy == qat::Policy::preset("int4-channel").to_json());
}
