// Stacks of matrices: one slot, rows of the last dimension, and only what a batch hits is quantized.

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>

#include <filesystem>
#include <limits>

#include "catch.hpp"
#include "models.hpp"
#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/nn/experts.hpp"
#include "qat/ops/ops.hpp"

using namespace qat;

namespace {

struct MixtureImpl : torch::nn::Module {
  MixtureImpl() : experts(register_module("experts", nn::Experts(3, 64, 32))) {}
  nn::Experts experts;
};
TORCH_MODULE(Mixture);

/// [E, O, I] as the rows that a grid sees.
at::Tensor rows(const at::Tensor& stack) {
  return stack.detach().flatten(0, 1);
}

}  // namespace

TEST_CASE("a stack is one slot whose rows are those of its matrices") {
  for (const char* grid : {"q4_0", "int4_channel"}) {
    INFO(grid);
    at::manual_seed(5);
    Mixture mixture;
    PreparedModel model = prepare(mixture.ptr(), test::all(grid));
    REQUIRE(model.slots().size() == 2);
    CHECK(model.slots()[0].name == "experts.gate_up_proj");
    CHECK(model.slots()[1].name == "experts.down_proj");
    const std::vector<TensorReport> report = model.report();
    REQUIRE(report.size() == 2);
    CHECK(report[0].shape == std::vector<int64_t>{3, 64, 64});

    const QuantizedCheckpoint checkpoint = freeze(model);
    const QuantizedTensor& frozen = checkpoint.quantized.at("experts.down_proj");
    CHECK(frozen.shape == std::vector<int64_t>{3, 64, 32});
    CHECK(frozen.codes.sizes() == at::IntArrayRef({3 * 64, 32}));
    const at::Tensor expected = ops::fake_quantize(rows(mixture->experts->down_proj), grid);
    CHECK(at::equal(weight_of(checkpoint, "experts.down_proj"), expected.view({3, 64, 32})));

    const auto path = std::filesystem::temp_directory_path() / "libqat-experts-test.qat.safetensors";
    save(checkpoint, path.string());
    const QuantizedCheckpoint read = load(path.string());
    std::filesystem::remove(path);
    CHECK(read.quantized.at("experts.down_proj").shape == frozen.shape);
    CHECK(at::equal(read.quantized.at("experts.down_proj").codes, frozen.codes));
    CHECK(at::equal(weight_of(read, "experts.gate_up_proj"), weight_of(checkpoint, "experts.gate_up_proj")));
  }
}

TEST_CASE("an expert multiplies with what ships, and the others are not even looked at") {
  for (const char* scale : {"reference", "learned"}) {
    INFO(scale);
    at::manual_seed(5);
    Mixture mixture;
    const PreparedModel model =
        prepare(mixture.ptr(), Policy::from_json(R"({"rules": [{"match": ".*", "weight": "int4_channel"}],
            "estimator": {"kind": "ste", "scale": ")" +
                                                 std::string(scale) + "\"}}"));
    const at::Tensor shipped = weight_of(freeze(model), "experts.gate_up_proj");
    const at::Tensor x = at::randn({4, 64});
    const at::Tensor y = mixture->experts->gate_up().linear(1, x);
    CHECK(at::equal(y, at::linear(x, shipped[1])));
    y.square().sum().backward();
    const at::Tensor grad = mixture->experts->gate_up_proj.grad();
    CHECK(grad[1].abs().max().item<double>() > 0);
    CHECK(grad[0].abs().max().item<double>() == 0);
    CHECK(grad[2].abs().max().item<double>() == 0);
    for (const NamedTensor& scales : model.scale_parameters()) {
      if (scales.name != "experts.gate_up_proj_scales") continue;
      const at::Tensor by_expert = scales.value.grad().view({3, 64});
      CHECK(by_expert[1].abs().max().item<double>() > 0);
      CHECK(by_expert[0].abs().max().item<double>() == 0);
    }
    // A weight that no grid can hold, in an expert that is not called.
    const at::NoGradGuard no_grad;
    mixture->experts->gate_up_proj[2][0][0] = std::numeric_limits<float>::infinity();
    CHECK_NOTHROW(mixture->experts->gate_up().linear(1, x));
    if (scale == std::string("reference")) {
      CHECK_THROWS_AS(mixture->experts->gate_up().linear(2, x), NumericError);
    }
  }
}

TEST_CASE("widths are those of the matrices, not of their stack") {
  Mixture mixture;  // rows of 64 and 32: a block of 64 divides 64 * 32, but not 32
  CHECK_THROWS_AS(prepare(mixture.ptr(), test::all("q2_0")), ArgumentError);
}

TEST_CASE("one scale for a whole stack is refused") {
  Mixture mixture;
  CHECK_THROWS_AS(prepare(mixture.ptr(), test::all("int8_tensor")), UnsupportedError);
}
