#include "qat/export/requantization.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "export/hf_dtype.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"

namespace qat {
namespace {

constexpr int64_t kGrain = 65536;  // weights that a thread should have before another one is worth waking

/// One row through the grid's own rule. Legend: N weights, G blocks, P scale parameters per block.
class RowQuantizer {
 public:
  RowQuantizer(const grid::Grid& grid, int64_t width)
      : grid_(grid),
        width_(width),
        codes_(static_cast<std::size_t>(width)),
        scales_(static_cast<std::size_t>(grid.blocks(width) * grid.params())),
        stored_(scales_.size()) {}

  /// w: float32[N], codes: int8[N], stored: float32[G, P] -> blocks that come out differently.
  int64_t changed_blocks(const float* w, const int8_t* codes, const float* stored) {
    status_ = grid_.choose(w, width_, scales_.data());
    if (status_ == grid::Status::kOk) status_ = grid_.store(scales_.data(), width_, stored_.data());
    if (status_ != grid::Status::kOk) return 0;
    grid_.encode(w, width_, scales_.data(), codes_.data());
    const int64_t block = grid_.block(width_), params = grid_.params();
    int64_t changed = 0;
    for (int64_t i = 0; i < grid_.blocks(width_); ++i) {
      const bool same = std::equal(codes + i * block, codes + (i + 1) * block, codes_.data() + i * block) &&
                        std::memcmp(stored + i * params, stored_.data() + i * params,
                                    static_cast<std::size_t>(params) * sizeof(float)) == 0;
      changed += same ? 0 : 1;
    }
    return changed;
  }
  grid::Status status() const noexcept { return status_; }

 private:
  const grid::Grid& grid_;
  int64_t width_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_, stored_;
  grid::Status status_ = grid::Status::kOk;
};

Requantization requantize(const std::string& key, const QuantizedTensor& tensor, const HfDtype& dtype) {
  const grid::Grid& grid = grid::find(tensor.scheme.weight);
  const at::Tensor exact = dequantize_tensor(key, tensor);
  const at::Tensor written = exact.to(dtype.tensor).to(at::kFloat).contiguous();
  const at::Tensor codes = tensor.codes.cpu().contiguous(), scales = tensor.scales.cpu().contiguous();
  const int64_t rows = grid.scale_rows(codes.size(0)), width = codes.numel() / rows;
  const int64_t per_row = grid.blocks(width) * grid.params();
  Requantization result{key, tensor.scheme.weight, rows * grid.blocks(width), 0, rows * width, 0};
  result.rounded_weights = (exact != written).sum().item<int64_t>();
  std::atomic<int64_t> changed{0};
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    RowQuantizer quantizer(grid, width);
    for (int64_t row = begin; row < end; ++row) {
      changed += quantizer.changed_blocks(written.const_data_ptr<float>() + row * width,
                                          codes.const_data_ptr<int8_t>() + row * width,
                                          scales.const_data_ptr<float>() + row * per_row);
      if (quantizer.status() == grid::Status::kOk) continue;
      throw NumericError("requantization_report: " + key + ": row " + std::to_string(row) +
                         ": expected weights that " + std::string(dtype.name) + " holds, got one that " +
                         std::string(grid::to_string(quantizer.status())));
    }
  });
  result.changed_blocks = changed;
  return result;
}

}  // namespace

std::vector<Requantization> requantization_report(const QuantizedCheckpoint& checkpoint,
                                                  std::string_view dtype) {
  const HfDtype& type = hf_dtype(dtype);
  std::vector<Requantization> report;
  for (const auto& [key, tensor] : checkpoint.quantized) report.push_back(requantize(key, tensor, type));
  return report;
}

}  // namespace qat
