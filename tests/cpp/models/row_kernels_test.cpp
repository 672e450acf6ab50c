#include "models/row_kernels.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "catch.hpp"
#include "qat/grid/bf16.hpp"
#include "random_values.hpp"

namespace kernels = qat::models::kernels;
using qat::grid::bf16_bits;
using qat::grid::bf16_value;

namespace {

// Below, at and beyond one vector and the lanes of the sums, and a model's own width.
const std::vector<int64_t> kWidths = {1, 15, 16, 17, 63, 576};

std::vector<uint16_t> rounded(const std::vector<float>& values) {
  std::vector<uint16_t> bits;
  for (const float value : values) bits.push_back(bf16_bits(value));
  return bits;
}

double silu(double x) {
  return x / (1.0 + std::exp(-x));
}

}  // namespace

TEST_CASE("rms_norm agrees with its formula in double") {
  for (const int64_t n : kWidths) {
    const auto x = random_values(n, 1), w = random_values(n, 2);
    double squares = 0.0;
    for (const float value : x) squares += static_cast<double>(value) * value;
    const double r = 1.0 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
    std::vector<float> y(x.size());
    std::vector<uint16_t> bits(x.size());
    REQUIRE(kernels::rms_norm(x.data(), w.data(), n, 1e-5F, y.data()) == Approx(r).epsilon(1e-6));
    kernels::rms_norm(x.data(), w.data(), n, 1e-5F, bits.data());
    for (size_t i = 0; i < x.size(); ++i) {
      // A few float32 roundings: 1e-6 is about 8 of them.
      REQUIRE(y[i] == Approx(w[i] * (x[i] * r)).epsilon(1e-6));
      REQUIRE(bits[i] == bf16_bits(y[i]));
    }
  }
}

TEST_CASE("rms_norm of zeros is zero and of NaN is NaN") {
  std::vector<float> x(20, 0.0F), w(20, 1.0F), y(20, 7.0F);
  kernels::rms_norm(x.data(), w.data(), 20, 1e-5F, y.data());
  for (const float value : y) REQUIRE(value == 0.0F);
  x[19] = std::numeric_limits<float>::quiet_NaN();
  kernels::rms_norm(x.data(), w.data(), 20, 1e-5F, y.data());
  for (const float value : y) REQUIRE(std::isnan(value));
}

TEST_CASE("silu_mul agrees with its formula over the whole range") {
  for (float x = -100.0F; x <= 100.0F; x += 0.0625F) {
    const float up = 3.0F;
    float y = 0.0F;
    kernels::silu_mul(&x, &up, 1, &y);
    // Beyond -87 the exponential stays at its border: the result is below 1e-35 there, as it should be.
    REQUIRE(y == Approx(3.0 * silu(x)).epsilon(1e-6).margin(1e-35));
  }
}

TEST_CASE("gelu_mul agrees with its formula over the whole range, and its slope stays finite") {
  for (float x = -100.0F; x <= 100.0F; x += 0.0625F) {
    const float up = 3.0F, grad = 1.0F;
    float y = 0.0F, grad_gate = 0.0F, grad_up = 0.0F;
    kernels::gelu_mul(&x, &up, 1, &y);
    // 1 + tanh(u) as the logistic function of 2u, which does not cancel for x below 0.
    const double u = std::sqrt(2.0 / M_PI) * (x + 0.044715 * std::pow(static_cast<double>(x), 3));
    // The exponent 2u is rounded three times to float32, so its error, and that of e^2u, grows with it.
    const double error = 1e-6 + 2e-7 * std::abs(2.0 * u);
    REQUIRE(y == Approx(3.0 * x / (1.0 + std::exp(-2.0 * u))).epsilon(error).margin(1e-35));
    kernels::gelu_mul_backward(&x, &up, &grad, 1, &grad_gate, &grad_up);
    REQUIRE(std::isfinite(grad_gate));
    REQUIRE(grad_up == Approx(y / 3.0F).epsilon(1e-6).margin(1e-35));
  }
}

TEST_CASE("silu_mul keeps NaN and infinity") {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> gate = {std::numeric_limits<float>::quiet_NaN(), infinity}, up = {1.0F, 2.0F};
  std::vector<float> y(2);
  kernels::silu_mul(gate.data(), up.data(), 2, y.data());
  REQUIRE(std::isnan(y[0]));
  REQUIRE(y[1] == infinity);
}

TEST_CASE("bfloat16 rows are the float rows of rounded inputs, rounded once") {
  for (const int64_t n : kWidths) {
    const auto gate_bits = rounded(random_values(n, 3)), up_bits = rounded(random_values(n, 4)),
               grad_bits = rounded(random_values(n, 5));
    std::vector<float> gate, up, grad;
    for (size_t i = 0; i < gate_bits.size(); ++i) {
      gate.push_back(bf16_value(gate_bits[i]));
      up.push_back(bf16_value(up_bits[i]));
      grad.push_back(bf16_value(grad_bits[i]));
    }
    const size_t size = gate.size();
    std::vector<float> y(size), grad_gate(size), grad_up(size);
    std::vector<uint16_t> y_bits(size), grad_gate_bits(size), grad_up_bits(size);
    kernels::silu_mul(gate.data(), up.data(), n, y.data());
    kernels::silu_mul(gate_bits.data(), up_bits.data(), n, y_bits.data());
    kernels::silu_mul_backward(gate.data(), up.data(), grad.data(), n, grad_gate.data(), grad_up.data());
    kernels::silu_mul_backward(gate_bits.data(), up_bits.data(), grad_bits.data(), n, grad_gate_bits.data(),
                               grad_up_bits.data());
    REQUIRE(y_bits == rounded(y));
    REQUIRE(grad_gate_bits == rounded(grad_gate));
    REQUIRE(grad_up_bits == rounded(grad_up));
  }
}

TEST_CASE("rotate turns half-split pairs and the opposite angle turns them back") {
  const int64_t half = 24;
  const auto x = random_values(2 * half, 6), angles = random_values(half, 7);
  std::vector<float> cos, sin, back;
  for (const float angle : angles) {
    cos.push_back(std::cos(angle));
    sin.push_back(std::sin(angle));
    back.push_back(-std::sin(angle));
  }
  std::vector<float> y(x.size()), again(x.size());
  kernels::rotate(x.data(), cos.data(), sin.data(), half, y.data());
  kernels::rotate(y.data(), cos.data(), back.data(), half, again.data());
  for (size_t i = 0; i < static_cast<size_t>(half); ++i) {
    const double c = std::cos(static_cast<double>(angles[i])), s = std::sin(static_cast<double>(angles[i]));
    const size_t j = i + static_cast<size_t>(half);
    // Two products and a sum in float32, each within 6e-8 of values below 10.
    REQUIRE(y[i] == Approx(x[i] * c - x[j] * s).margin(2e-6));
    REQUIRE(y[j] == Approx(x[j] * c + x[i] * s).margin(2e-6));
  }
  for (size_t i = 0; i < x.size(); ++i) REQUIRE(again[i] == Approx(x[i]).margin(2e-6));
}
