#include "qat/prepare/report.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/ops/fake_quantize.hpp"

namespace qat {
namespace {

/// "f32", "bf16", ...: the spelling of grids where there is one, torch's otherwise.
std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "f32";
    case at::kHalf:
      return "f16";
    case at::kBFloat16:
      return "bf16";
    default:
      return c10::toString(dtype);
  }
}

double rms(const at::Tensor& tensor) {
  return std::sqrt(tensor.to(at::kDouble).square().mean().item<double>());
}

double relative_error(const at::Tensor& latent, const Scheme& scheme, ScaleRule scale,
                      const at::Tensor& scales, const std::string& name) {
  const at::NoGradGuard no_grad;
  const double size = rms(latent);
  const at::Tensor weight =
      ops::fake_quantize(latent, scheme.weight, {EstimatorKind::kSte, scale}, name, scales);
  return size == 0.0 ? 0.0 : rms(weight.to(at::kDouble) - latent.to(at::kDouble)) / size;
}

std::string format(const char* pattern, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), pattern, value);
  return text.data();
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text.append(text.empty() ? "" : " x ").append(std::to_string(size));
  return text.empty() ? "scalar" : text;
}

int64_t weights_of(const TensorReport& line) {
  int64_t count = 1;
  for (int64_t size : line.shape) count *= size;
  return count;
}

/// The grid, and how activations are rounded if they are: "mobile4 in int8_tensor_static".
std::string storage_text(const TensorReport& line) {
  if (line.input == line.output) return line.grid + (line.input.empty() ? "" : " in/out " + line.input);
  const auto side = [](const char* name, const std::string& format) {
    return format.empty() ? "" : std::string(name) + format;
  };
  return line.grid + side(" in ", line.input) + side(" out ", line.output);
}

using Cells = std::array<std::string, 7>;

Cells cells_of(const TensorReport& line) {
  return {line.name,
          std::string(to_string(line.kind)),
          shape_text(line.shape),
          storage_text(line),
          format("%.3f", line.bits_per_weight),
          line.relative_error == 0.0 ? "-" : format("%.2f %%", 100.0 * line.relative_error),
          std::to_string(line.bytes)};
}

Cells totals_of(const std::vector<TensorReport>& report) {
  int64_t weights = 0;
  int64_t bytes = 0;
  for (const TensorReport& line : report) {
    weights += weights_of(line);
    bytes += line.bytes;
  }
  const double bits = weights == 0 ? 0.0 : 8.0 * static_cast<double>(bytes) / static_cast<double>(weights);
  return {
      "total", "", std::to_string(weights) + " weights", "", format("%.3f", bits), "", std::to_string(bytes)};
}

}  // namespace

TensorReport report_tensor(const std::string& name, SlotKind kind, const at::Tensor& latent,
                           const Scheme& scheme, ScaleRule scale, const at::Tensor& scales) {
  const int64_t weights = latent.numel();
  TensorReport line{name, kind, latent.sizes().vec(), scheme.weight, 0.0, 0, 0.0};
  if (scheme == Scheme{}) {
    line.grid = dtype_name(latent.scalar_type());
    line.bytes = static_cast<int64_t>(latent.nbytes());
  } else {
    const grid::Grid& grid = grid::find(scheme.weight);
    const int64_t rows = grid.info().is_float ? 1 : latent.size(0);
    line.relative_error = relative_error(latent, scheme, scale, scales, name);
    line.bytes = grid::tensor_bytes(grid, rows, weights / rows);
  }
  if (weights > 0)
    line.bits_per_weight = 8.0 * static_cast<double>(line.bytes) / static_cast<double>(weights);
  return line;
}

std::string to_string(const std::vector<TensorReport>& report) {
  std::vector<Cells> rows{{"tensor", "kind", "shape", "grid", "bits/weight", "error", "bytes"}};
  for (const TensorReport& line : report) rows.push_back(cells_of(line));
  rows.push_back(totals_of(report));
  std::array<size_t, std::tuple_size_v<Cells>> widths{};
  for (const Cells& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  constexpr size_t kFirstNumber = 4;  // numbers stand to the right of their column
  std::string text;
  for (const Cells& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - row[i].size(), ' ');
      if (i > 0) text += "  ";
      if (i >= kFirstNumber) text += padding;
      text += row[i];
      if (i < kFirstNumber) text += padding;
    }
    text += "\n";
  }
  return text;
}

}  // namespace qat
