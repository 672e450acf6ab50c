// Weights of a module from and to files, by name.

#include "qat/prepare/state.hpp"

#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>

#include <filesystem>
#include <fstream>

#include "models.hpp"
#include "qat/core/error.hpp"
#include "qat/io/safetensors.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using Catch::Matchers::Contains;
using qat::test::ConvNet;
using qat::test::Tied;

/// A folder that lasts as long as the test.
struct Scratch {
  Scratch() { std::filesystem::create_directories(folder); }
  ~Scratch() { std::filesystem::remove_all(folder); }
  std::string operator/(const char* name) const { return (folder / name).string(); }

  std::filesystem::path folder = std::filesystem::temp_directory_path() / "qat_state_test";
};

void expect_equal(const torch::nn::Module& one, const torch::nn::Module& two) {
  const auto a = one.named_parameters(), b = two.named_parameters();
  REQUIRE(a.keys() == b.keys());
  for (const auto& parameter : a) REQUIRE(at::equal(parameter.value(), b[parameter.key()]));
  const auto c = one.named_buffers(), d = two.named_buffers();
  REQUIRE(c.keys() == d.keys());
  for (const auto& buffer : c) REQUIRE(at::equal(buffer.value(), d[buffer.key()]));
}

}  // namespace

TEST_CASE("a module comes back from its file, statistics included, in place") {
  at::manual_seed(1);
  const Scratch scratch;
  ConvNet net, other;
  net->forward(at::randn({4, 2, 6, 6}));
  qat::save_state(*net, scratch / "net.safetensors");
  const void* before = other->conv->weight.const_data_ptr();
  qat::load_state(*other, scratch / "net.safetensors");
  expect_equal(*net, *other);
  REQUIRE(other->conv->weight.const_data_ptr() == before);
  REQUIRE(other->conv->weight.requires_grad());
}

TEST_CASE("a module computes with the numbers of a checkpoint, from memory and from its file") {
  at::manual_seed(2);
  const Scratch scratch;
  ConvNet net, one, two;
  const auto model = qat::prepare(net.ptr(), qat::test::all("int4_channel"));
  const auto checkpoint = qat::freeze(model);
  qat::save(checkpoint, scratch / "net.qat.safetensors");
  qat::load_state(*one, checkpoint);
  qat::load_state(*two, scratch / "net.qat.safetensors");
  expect_equal(*one, *two);
  REQUIRE(at::equal(one->conv->weight, qat::weight_of(checkpoint, "conv.weight")));
  net->eval(), one->eval();
  const at::Tensor input = at::randn({2, 2, 6, 6});
  auto prepared = qat::prepare(net.ptr(), qat::test::all("int4_channel"));
  const auto quantized = prepared.quantized();
  REQUIRE(at::equal(net->forward(input), one->forward(input)));
}

TEST_CASE("tied tensors are stored once and found under either name") {
  at::manual_seed(3);
  const Scratch scratch;
  Tied net(true), tied(true), untied(false);
  qat::find_slots(*net);  // the registry then says what forward reads
  qat::save_state(*net, scratch / "tied.safetensors");
  const qat::io::SafetensorsFile file(scratch / "tied.safetensors");
  REQUIRE(file.tensors().size() == 2);
  qat::find_slots(*tied);
  qat::load_state(*tied, scratch / "tied.safetensors");
  expect_equal(*net, *tied);
  REQUIRE_THROWS_WITH(qat::load_state(*untied, scratch / "tied.safetensors"),
                      Contains("head.weight: expected Float[10, 32], got none"));

  const auto checkpoint = qat::freeze(qat::prepare(net.ptr(), qat::test::all("q8_0")));
  qat::load_state(*untied, checkpoint);  // the alias serves the second name
  REQUIRE(at::equal(untied->head->weight, untied->embed->weight));
  qat::load_state(*tied, checkpoint);
  REQUIRE(at::equal(tied->embed->weight, untied->embed->weight));
}

TEST_CASE("floats are converted to the module's type") {
  at::manual_seed(4);
  const Scratch scratch;
  Tied half(false), net(false);
  half->to(at::kBFloat16);
  qat::save_state(*half, scratch / "half.safetensors");
  qat::load_state(*net, scratch / "half.safetensors");
  REQUIRE(net->up->weight.scalar_type() == at::kFloat);
  REQUIRE(at::equal(net->up->weight, half->up->weight.to(at::kFloat)));
}

TEST_CASE("everything that does not fit is listed, and the module stays as it was") {
  at::manual_seed(5);
  const Scratch scratch;
  Tied source(false);
  qat::save_state(*source, scratch / "tied.safetensors");
  ConvNet net, untouched;
  {
    const at::NoGradGuard no_grad;
    for (auto& parameter : untouched->named_parameters())
      parameter.value().copy_(net->named_parameters()[parameter.key()]);
  }
  REQUIRE_THROWS_AS(qat::load_state(*net, scratch / "tied.safetensors"), qat::FileError);
  REQUIRE_THROWS_WITH(qat::load_state(*net, scratch / "tied.safetensors"),
                      Contains("conv.weight: expected Float[4, 2, 3, 3], got none") &&
                          Contains("up.weight: expected a tensor of the module, got another name"));
  expect_equal(*net, *untouched);
  REQUIRE_THROWS_AS(qat::load_state(*net, qat::freeze(qat::prepare(source.ptr(), qat::test::all("q8_0")))),
                    qat::ArgumentError);

  torch::nn::Linear narrow(3, 2), wide(2, 3);
  qat::save_state(*narrow, scratch / "narrow.safetensors");
  REQUIRE_THROWS_WITH(qat::load_state(*wide, scratch / "narrow.safetensors"),
                      Contains("weight: expected Float[3, 2], got Float[2, 3]"));
  REQUIRE_THROWS_AS(qat::load_state(*wide, scratch / "absent.safetensors"), qat::FileError);
  std::ofstream(scratch / "junk.safetensors") << "not a header";
  REQUIRE_THROWS_AS(qat::load_state(*wide, scratch / "junk.safetensors"), qat::FileError);
}
