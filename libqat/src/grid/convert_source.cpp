#include "grid/convert_source.hpp"

#include <algorithm>

namespace qat::grid {

Roles::Roles(const Info& info) {
  int at = 0;
  for (const Field& field : info.fields) {
    if (field.name == "scales") scale = at;
    if (field.name == "mins" || field.name == "biases") offset = at;
    if (field.name == "zero_points") zero_point = at;
    if (field.name == "sub_scales") {
      sub_scales = at;
      runs = field.count;
    }
    if (field.name == "sub_mins") sub_offsets = at;
    at += field.count;
  }
}

ConvertSource::ConvertSource(const Grid& grid, int64_t block, int64_t n)
    : grid_(grid),
      block_(block),
      roles_(grid.info()),
      same_code_(static_cast<size_t>(n)),
      values_(same_code_.size()),
      lowest_(same_code_.size()),
      highest_(same_code_.size()) {}

void ConvertSource::read(const int8_t* codes, const float* stored) {
  codes_ = codes;
  stored_ = stored;
  decode(codes, values_.data());
  std::fill(same_code_.begin(), same_code_.end(), static_cast<int8_t>(grid_.info().code_min));
  decode(same_code_.data(), lowest_.data());
  std::fill(same_code_.begin(), same_code_.end(), static_cast<int8_t>(grid_.info().code_max));
  decode(same_code_.data(), highest_.data());
}

float ConvertSource::step(int64_t i) const noexcept {
  const float* stored = stored_of(i);
  const float scale = stored[roles_.scale];
  return roles_.sub_scales < 0 ? scale : scale * stored[roles_.sub_scales + i % block_ / run()];
}

bool ConvertSource::uniform(int64_t i, int64_t n) const noexcept {
  for (int64_t next = (i / run() + 1) * run(); next < i + n; next += run()) {
    if (step(next) != step(i) || lowest(next) != lowest(i)) return false;
  }
  return true;
}

/// Block by block, because one that is a whole row of the source may be a part of the row given here.
void ConvertSource::decode(const int8_t* codes, float* w) const {
  for (int64_t i = 0; i < static_cast<int64_t>(values_.size()); i += block_) {
    grid_.decode(codes + i, block_, stored_of(i), w + i);
  }
}

}  // namespace qat::grid
