#include "grid/convert_target.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "qat/grid/device.hpp"
#include "qat/grid/stored.hpp"

namespace qat::grid {
namespace {

std::string text_of(float value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.9g", static_cast<double>(value));
  return text.data();
}

/// The field of parameter `index` of a block.
const Field& field_of(const Info& info, int index) {
  const Field* field = info.fields.data();
  for (; index >= field->count; ++field) index -= field->count;
  return *field;
}

/// The first weight that differs, n for none: by bits, but 0 equals -0.
int64_t first_difference(const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (bits_of(a[i]) != bits_of(b[i]) && (magnitude_bits(a[i]) | magnitude_bits(b[i])) != 0) return i;
  }
  return n;
}

/// What each code decodes to beside a scale of 1, without repetition and 0, the largest magnitude first.
std::vector<float> multipliers_of(const Grid& grid) {
  const Info& info = grid.info();
  const int64_t codes = info.code_max - info.code_min + 1;
  const int64_t block = info.block > 0 ? info.block : codes;
  const int64_t n = (codes + block - 1) / block * block;
  std::vector<int8_t> code(static_cast<size_t>(n), static_cast<int8_t>(info.code_min));
  for (int64_t i = 0; i < codes; ++i) code[static_cast<size_t>(i)] = static_cast<int8_t>(info.code_min + i);
  const std::vector<float> ones(static_cast<size_t>(n / block * grid.params()), 1.0F);
  std::vector<float> values(code.size());
  grid.decode(code.data(), n, ones.data(), values.data());
  std::erase(values, 0.0F);
  std::sort(values.begin(), values.end(), [](float a, float b) {
    return magnitude(a) != magnitude(b) ? magnitude(a) > magnitude(b) : a > b;
  });
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

bool same_fields(const Info& one, const Info& other) {
  return std::equal(one.fields.begin(), one.fields.end(), other.fields.begin(), other.fields.end(),
                    [](const Field& a, const Field& b) { return a.name == b.name && a.count == b.count; });
}

void keep_smaller(float value, float& least) {
  if (value != 0.0F && (least == 0.0F || magnitude(value) < magnitude(least))) least = value;
}

}  // namespace

ConvertTarget::ConvertTarget(const Grid& grid, int64_t n)
    : grid_(grid), block_(grid.block(n)), roles_(grid.info()), decoded_(static_cast<size_t>(block_)) {
  if (roles_.is_plain()) multipliers_ = multipliers_of(grid);
}

std::string ConvertTarget::convert(const ConvertSource& source, int64_t first, int8_t* codes, float* stored) {
  source_ = &source;
  first_ = first;
  codes_ = codes;
  why_.clear();
  if (!copied() && !from_steps() && !from_values()) return reason();
  std::copy_n(params_.begin(), grid_.params(), stored);
  return "";
}

/// Whether `params_` give the weights back. The first failure of a block is remembered: it belongs to the
/// most natural parameters.
bool ConvertTarget::attempt() {
  const int bad = first_not_stored(grid_, params_.data());
  if (bad >= 0) {
    if (why_.empty()) why_ = not_stored(bad);
    return false;
  }
  grid_.encode(values(), block_, params_.data(), codes_);
  grid_.decode(codes_, block_, params_.data(), decoded_.data());
  const int64_t at = first_difference(values(), decoded_.data(), block_);
  if (at < block_ && why_.empty()) why_ = no_code(at);
  return at == block_;
}

bool ConvertTarget::attempt(float scale) {
  param(roles_.scale) = scale;
  return attempt();
}

bool ConvertTarget::attempt_offset(float scale, float offset) {
  param(roles_.offset) = offset;
  return attempt(scale);
}

/// `lowest`: the weight that is to have the least code.
bool ConvertTarget::attempt_zero_point(float scale, float lowest) {
  const float zero_point = static_cast<float>(grid_.info().code_min) - std::nearbyint(lowest / scale);
  param(roles_.zero_point) = zero_point + 0.0F;  // never -0
  return attempt(scale);
}

/// The parameters of the source, where the target has the same ones.
bool ConvertTarget::copied() {
  if (!same_fields(source_->grid().info(), grid_.info())) return false;
  if (roles_.sub_scales < 0 ? !uniform() : source_->block() != block_) return false;
  std::copy_n(source_->stored_of(first_), grid_.params(), params_.begin());
  return attempt();
}

bool ConvertTarget::from_steps() {
  if (roles_.sub_scales >= 0) return two_levels();
  if (!uniform()) return false;
  const float step = source_->step(first_);
  const float lowest = source_->lowest(first_);
  const float highest = source_->highest(first_);
  if (roles_.offset >= 0) return attempt_offset(step, lowest) || attempt_offset(-step, highest);
  if (roles_.zero_point < 0) return attempt(step) || attempt(-step);
  return step != 0.0F && (attempt_zero_point(step, lowest) || attempt_zero_point(-step, highest));
}

/// Each run's step as a multiple of the smallest one, each run's lowest weight likewise.
bool ConvertTarget::two_levels() {
  const int64_t run = block_ / roles_.runs;
  float step = 0.0F;
  float offset = 0.0F;
  for (int64_t i = first_; i < first_ + block_; i += run) {
    if (!source_->uniform(i, run)) return false;
    keep_smaller(source_->step(i), step);
    keep_smaller(-source_->lowest(i), offset);
  }
  for (int j = 0; j < roles_.runs; ++j) {
    const int64_t i = first_ + j * run;
    param(roles_.sub_scales + j) = step == 0.0F ? 1.0F : source_->step(i) / step;
    if (roles_.sub_offsets < 0) continue;
    param(roles_.sub_offsets + j) = offset == 0.0F ? 0.0F : -source_->lowest(i) / offset + 0.0F;
  }
  if (roles_.offset >= 0) param(roles_.offset) = offset;
  return attempt(step);
}

/// Without regard to the source's structure: a block may use few of its codes, or none but 0.
bool ConvertTarget::from_values() {
  if (roles_.sub_scales >= 0) return false;
  std::vector<float> sorted(values(), values() + block_);
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  if (roles_.is_plain()) return from_largest(sorted);
  float step = sorted.back() - sorted.front();
  for (size_t i = 1; i < sorted.size(); ++i) step = std::min(step, sorted[i] - sorted[i - 1]);
  for (const float scale : {source_->step(first_), step, step / 2.0F, magnitude(sorted.front()), 1.0F}) {
    if (roles_.offset >= 0 ? attempt_offset(scale, sorted.front())
                           : scale != 0.0F && attempt_zero_point(scale, sorted.front())) {
      return true;
    }
  }
  return false;
}

/// The weight of the largest magnitude has one of the target's codes: tries them all.
bool ConvertTarget::from_largest(const std::vector<float>& sorted) {
  const float largest = magnitude(sorted.front()) > magnitude(sorted.back()) ? sorted.front() : sorted.back();
  if (largest == 0.0F) return attempt(0.0F) || attempt(1.0F);
  return std::any_of(multipliers_.begin(), multipliers_.end(), [&](float multiplier) {
    const float scale = largest / multiplier;
    return scale * multiplier == largest && attempt(scale);
  });
}

std::string ConvertTarget::reason() const {
  if (roles_.sub_scales < 0 && !uniform()) return joined(first_, block_);
  const int64_t run = block_ / roles_.runs;
  for (int64_t i = first_; i < first_ + block_; i += run) {
    if (!source_->uniform(i, run)) return joined(i, run);
  }
  return why_;
}

std::string ConvertTarget::joined(int64_t i, int64_t n) const {
  int64_t next = i;
  while (source_->step(next) == source_->step(i) && source_->lowest(next) == source_->lowest(i)) {
    next += source_->run();
  }
  const bool steps = source_->step(next) != source_->step(i);
  const float one = steps ? source_->step(i) : source_->lowest(i);
  const float other = steps ? source_->step(next) : source_->lowest(next);
  return std::to_string(n) + " weights of " + std::string(grid_.info().name) + " would share " +
         (steps ? "the scales " : "the offsets ") + text_of(one) + " and " + text_of(other);
}

std::string ConvertTarget::not_stored(int bad) const {
  const Info& info = grid_.info();
  return std::string(field_of(info, bad).name) + " of " + std::string(info.name) + " cannot hold " +
         text_of(param(bad)) + " exactly";
}

std::string ConvertTarget::no_code(int64_t at) const {
  const Info& info = grid_.info();
  const Info& from = source_->grid().info();
  return "the weight " + text_of(values()[at]) + ", code " + std::to_string(source_->code(first_ + at)) +
         " of " + std::string(from.name) + ", has no code on " + std::string(info.name) + " with the scale " +
         text_of(param(roles_.scale));
}

}  // namespace qat::grid
