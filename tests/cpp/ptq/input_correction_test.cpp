// Weights that make up for the drift of their inputs, against least squares in float64.

#include "qat/ptq/input_correction.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_lstsq.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/ptq/calibration.hpp"

using namespace qat;

namespace {

at::Generator seeded(uint64_t seed) {
  return at::detail::createCPUGenerator(seed);
}

}  // namespace

TEST_CASE("at share 1 outputs are the least squares of the float model's") {
  const at::Tensor x_float = at::randn({300, 24}, seeded(1));
  const at::Tensor x = x_float + 0.3 * at::randn({300, 24}, seeded(2));
  const at::Tensor counts = at::rand({300}, seeded(3)) + 0.1;
  ptq::InputMoments moments(24);
  ptq::InputDrift drift(24);
  for (int64_t first = 0; first < 300; first += 100) {
    moments.add(x.narrow(0, first, 100), counts.narrow(0, first, 100));
    drift.add(x_float.narrow(0, first, 100), x.narrow(0, first, 100), counts.narrow(0, first, 100));
  }
  const at::Tensor w = at::randn({5, 24}, seeded(4)).to(at::kDouble);
  const at::Tensor root = counts.to(at::kDouble).sqrt().unsqueeze(1);
  const at::Tensor expected =
      std::get<0>(at::linalg_lstsq(x.to(at::kDouble) * root, at::mm(x_float.to(at::kDouble), w.t()) * root))
          .t();
  const at::Tensor full = ptq::input_correction(moments.second(), drift.mean(), 1.0, 0.0);
  // moments are summed in float32
  CHECK(at::allclose(w + at::mm(w, full.to(at::kDouble)), expected, 1e-3, 1e-4));
  const at::Tensor half = ptq::input_correction(moments.second(), drift.mean(), 0.5, 0.0);
  CHECK(at::allclose(2 * half, full, 1e-6, 1e-7));
}

TEST_CASE("inputs that did not drift need no correction") {
  const at::Tensor x = at::randn({50, 8}, seeded(5));
  ptq::InputDrift drift(8);
  drift.add(x, x);
  CHECK(ptq::input_correction(at::eye(8, at::kDouble), drift.mean(), 1.0, 0.01).abs().max().item<float>() ==
        0.0F);
}

TEST_CASE("what cannot be corrected is refused by name") {
  ptq::InputDrift drift(8);
  CHECK_THROWS_AS(drift.add(at::zeros({3, 9}), at::zeros({3, 9})), ArgumentError);
  CHECK_THROWS_AS(drift.add(at::zeros({2, 8}), at::zeros({3, 8})), ArgumentError);
  const at::Tensor h = at::eye(8, at::kDouble);
  CHECK_THROWS_WITH(ptq::input_correction(h, h, 1.5, 0.01, "w"),
                    Catch::Contains("input_correction: w: expected a share between 0 and 1"));
  CHECK_THROWS_AS(ptq::input_correction(h, at::eye(7, at::kDouble), 1.0, 0.01), ArgumentError);
  CHECK_THROWS_AS(ptq::input_correction(-h - 1, h, 1.0, 0.0), NumericError);
  const at::Tensor broken = at::full({8, 8}, std::numeric_limits<double>::quiet_NaN(), at::kDouble);
  CHECK_THROWS_AS(ptq::input_correction(h, broken, 1.0, 0.01), NumericError);
}
