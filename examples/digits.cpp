#include "digits.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <qat/core/error.hpp>
#include <qat/io/safetensors.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace {

constexpr int64_t kSide = 28;

const qat::io::SafetensorsTensor& expect(const qat::io::SafetensorsFile& file, const char* name,
                                         qat::io::Dtype dtype, const std::vector<int64_t>& shape) {
  const qat::io::SafetensorsTensor& tensor = file.at(name);
  if (tensor.dtype == dtype && tensor.shape == shape) return tensor;
  throw qat::FileError("read_digits: " + file.path().string() + ": " + name + ": expected " +
                       std::string(qat::io::to_string(dtype)) +
                       " with one entry for each picture of 28 x 28, got " +
                       std::string(qat::io::to_string(tensor.dtype)) + " of another shape");
}

/// The picture's seven segments: x and y of both ends, in units of a digit's half width and half height.
///   A on top, then clockwise B C D E F, and G in the middle
using Segment = std::array<double, 4>;
constexpr std::array<Segment, 7> kSegments{{{-1, -1, 1, -1},
                                            {1, -1, 1, 0},
                                            {1, 0, 1, 1},
                                            {-1, 1, 1, 1},
                                            {-1, 0, -1, 1},
                                            {-1, -1, -1, 0},
                                            {-1, 0, 1, 0}}};
/// Bit i: segment i is lit.
constexpr std::array<unsigned, 10> kLit{0x3f, 0x06, 0x5b, 0x4f, 0x66, 0x6d, 0x7d, 0x07, 0x7f, 0x6f};

double distance(double x, double y, const Segment& s) {
  const double dx = s[2] - s[0];
  const double dy = s[3] - s[1];
  const double along = std::clamp(((x - s[0]) * dx + (y - s[1]) * dy) / (dx * dx + dy * dy), 0.0, 1.0);
  return std::hypot(x - s[0] - along * dx, y - s[1] - along * dy);
}

using Random = std::mt19937_64;

/// Uniform in [low, high), computed here because the standard's distributions differ between libraries.
double uniform(Random& random, double low, double high) {
  return low + (high - low) * static_cast<double>(random() >> 11) * 0x1p-53;
}

void draw(unsigned digit, Random& random, float* pixels) {
  const double x0 = 13.5 + uniform(random, -3, 3);
  const double y0 = 13.5 + uniform(random, -3, 3);
  const double slant = uniform(random, -0.3, 0.3);
  const double width = uniform(random, 4, 6);
  const double height = uniform(random, 6.5, 9.5);
  const double stroke = uniform(random, 0.8, 1.8);
  for (int64_t i = 0; i < kSide * kSide; ++i) {
    const double v = (static_cast<double>(i / kSide) - y0) / height;
    const double u = (static_cast<double>(i % kSide) - x0) / width + slant * v;
    double nearest = 1e9;
    for (size_t s = 0; s < kSegments.size(); ++s) {
      if ((kLit[digit] >> s & 1U) != 0) nearest = std::min(nearest, distance(u, v, kSegments[s]));
    }
    const double ink = std::clamp(stroke + 0.5 - nearest * width, 0.0, 1.0);
    pixels[i] = static_cast<float>(std::clamp(ink + uniform(random, -0.25, 0.25), 0.0, 1.0));
  }
}

Digits normalised(const at::Tensor& images, const at::Tensor& labels) {
  const double mean = images.mean().item<double>();
  const double deviation = images.std().item<double>();
  return {(images - mean) / deviation, labels};
}

}  // namespace

Digits read_digits(const std::string& path) {
  using qat::io::Dtype;
  const qat::io::SafetensorsFile file(path);
  const std::vector<int64_t> listed = file.at("labels").shape;
  const int64_t count = listed.size() == 1 ? listed[0] : 0;
  const auto& pixels = expect(file, "images", Dtype::kU8, {count, kSide, kSide});
  const auto& digits = expect(file, "labels", Dtype::kI64, {count});

  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  Random random(0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);

  at::Tensor images = at::empty({count, 1, kSide, kSide}, at::kFloat);
  at::Tensor labels = at::empty({count}, at::kLong);
  float* pixel = images.mutable_data_ptr<float>();
  int64_t* label = labels.mutable_data_ptr<int64_t>();
  for (const int64_t source : order) {
    std::memcpy(label, digits.data.data() + source * 8, sizeof(int64_t));
    if (*label < 0 || *label > 9) {
      throw qat::FileError("read_digits: " + path + ": labels: expected 0 to 9, got " +
                           std::to_string(*label));
    }
    ++label;
    const std::byte* picture = pixels.data.data() + source * kSide * kSide;
    for (int64_t i = 0; i < kSide * kSide; ++i)
      *pixel++ = static_cast<float>(std::to_integer<int>(picture[i])) / 255.0F;
  }
  return normalised(images, labels);
}

Digits draw_digits(int64_t count, uint64_t seed) {
  Random random(seed);
  at::Tensor images = at::empty({count, 1, kSide, kSide}, at::kFloat);
  at::Tensor labels = at::empty({count}, at::kLong);
  for (int64_t i = 0; i < count; ++i) {
    const auto digit = static_cast<unsigned>(random() % 10);
    labels.mutable_data_ptr<int64_t>()[i] = digit;
    draw(digit, random, images.mutable_data_ptr<float>() + i * kSide * kSide);
  }
  return normalised(images, labels);
}
