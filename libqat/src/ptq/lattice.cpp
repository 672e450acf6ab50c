#include "qat/ptq/lattice.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "ptq/check.hpp"
#include "ptq/lattice_block.hpp"
#include "ptq/scales.hpp"
#include "qat/core/error.hpp"

namespace qat::ptq {
namespace {

/// The rule explains a tensor when at most one block in a thousand needs fitting: an accident of few codes.
constexpr double kExplained = 0.999;
/// Fewer exact blocks than that are accidents, too.
constexpr double kMost = 0.5;
/// The share of blocks that a bfloat16 scale fits when scales are bfloat16: all but those off the lattice.
constexpr double kNarrow = 0.9;

bool lattice_of(const grid::Grid& grid) {
  const grid::Info& info = grid.info();
  return !info.is_float && info.code_min < 0 && grid.params() == 1;
}

/// All blocks of a tensor, as rows of one block.
struct Blocks {
  const grid::Grid& grid;
  at::Tensor w;  ///< float32[blocks, n]
  FileType type;
  std::vector<BlockLattice> found;

  void find(const Subject& subject, Reading reading, int64_t per_row) {
    const float* values = w.const_data_ptr<float>();
    const int64_t n = w.size(1);
    found.resize(static_cast<std::size_t>(w.size(0)));
    const auto row_of = [per_row](int64_t block, grid::Status) { return block / per_row; };
    for_each_row(
        subject, w.size(0), n,
        [&] {
          return [&, finder = LatticeFinder(grid, type, n)](int64_t block) mutable {
            return finder(values + block * n, reading, found[static_cast<std::size_t>(block)]);
          };
        },
        row_of);
  }

  double share(auto predicate) const {
    return static_cast<double>(std::count_if(found.begin(), found.end(), predicate)) /
           static_cast<double>(found.size());
  }
};

bool is_bf16(float scale) {
  return rounded_to(FileType::kBf16, scale) == scale;
}

}  // namespace

std::string_view to_string(LatticeRule rule) noexcept {
  if (rule == LatticeRule::kConsumer) return "consumer";
  return rule == LatticeRule::kFitted ? "fitted" : "none";
}

bool has_lattice(std::string_view grid) {
  return lattice_of(grid::find(grid));
}

Lattice find_lattice(const at::Tensor& weight, std::string_view name, std::string_view tensor) {
  const Subject subject{"find_lattice", tensor};
  const grid::Grid& grid = check_coded(subject, weight, name);
  if (!lattice_of(grid)) fail(subject, "a grid with levels code * scale", std::string(name));
  const at::Tensor rows = rows_of(weight);
  check_finite(subject, "weights", rows);
  const bool whole = grid.info().block == grid::kWholeTensor;
  const int64_t width = whole ? rows.numel() : rows.size(1), n = grid.block(width);
  const int64_t per_row = width / n;
  Blocks blocks{grid, rows.view({-1, n}), file_type(rows.const_data_ptr<float>(), rows.numel()), {}};
  blocks.find(subject, {.fitted = false, .bf16_scales = true}, whole ? 1 : per_row);
  const double exact = blocks.share([](const BlockLattice& one) { return one.exact; });
  const double ruled = blocks.share([](const BlockLattice& one) { return one.exact && !one.fitted; });
  const double narrow = blocks.share([](const BlockLattice& one) { return one.exact && is_bf16(one.scale); });
  Lattice result;
  result.blocks = blocks.w.size(0);
  if (exact < kMost) {
    result.exact = static_cast<int64_t>(exact * static_cast<double>(result.blocks) + 0.5);
    result.scales = choose_scales("find_lattice", tensor, grid, {}, rows, {});
    for (const BlockLattice& one : blocks.found) result.worst = std::max(result.worst, one.error);
    return result;
  }
  const bool explained = ruled >= kExplained * exact, bf16 = narrow > kNarrow * exact;
  const Reading reading{!explained, bf16};
  result.rule = reading.fitted ? LatticeRule::kFitted : LatticeRule::kConsumer;
  if (!explained || !bf16) blocks.find(subject, reading, whole ? 1 : per_row);
  result.scales = at::empty({whole ? 1 : rows.size(0), per_row, 1}, rows.options());
  float* scales = result.scales.mutable_data_ptr<float>();
  for (const BlockLattice& one : blocks.found) {
    *scales++ = one.scale;
    result.exact += one.exact ? 1 : 0;
    if (!one.exact) result.worst = std::max(result.worst, one.error);
  }
  return result;
}

std::vector<LatticeTensor> apply_lattice(
    PreparedModel& model,
    const std::function<void(int64_t done, int64_t total, const std::string& tensor)>& progress) {
  const at::NoGradGuard no_grad;
  std::vector<LatticeTensor> found;
  const auto total = static_cast<int64_t>(model.slots().size());
  for (int64_t i = 0; i < total; ++i) {
    const Slot& slot = model.slots()[static_cast<std::size_t>(i)];
    if (progress) progress(i, total, slot.name);
    Quantizer* const quantizer = model.quantizers()[static_cast<std::size_t>(i)].get();
    if (quantizer == nullptr) continue;
    const std::string& grid = quantizer->scheme().weight;
    if (grid::find(grid).info().is_float) continue;
    if (!quantizer->learned()) {
      fail({"apply_lattice", slot.name}, "a policy with learned scales, which hold the result",
           "scale \"" + std::string(to_string(quantizer->estimator().scale)) + "\"");
    }
    if (quantizer->tied() || !has_lattice(grid)) {
      quantizer->initialize_scales(slot.get(), ScaleRule::kReference);
      continue;
    }
    Lattice lattice = find_lattice(quantizer->matrix(slot.get().detach()), grid, slot.name);
    quantizer->set_field_scales(lattice.scales.to(slot.get().device()));
    found.push_back({slot.name, grid, std::move(lattice)});
  }
  if (progress) progress(total, total, "");
  return found;
}

}  // namespace qat::ptq
