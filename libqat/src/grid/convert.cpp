#include "qat/grid/convert.hpp"

#include "grid/convert_source.hpp"
#include "grid/convert_target.hpp"

namespace qat::grid {

RowConverter::RowConverter(const Grid& from, int64_t from_block, const Grid& to, int64_t n)
    : n_(n),
      source_(std::make_unique<ConvertSource>(from, from_block, n)),
      target_(std::make_unique<ConvertTarget>(to, n)) {}

RowConverter::~RowConverter() = default;

std::string RowConverter::convert(const int8_t* codes, const float* stored, int8_t* to_codes,
                                  float* to_stored) {
  source_->read(codes, stored);
  const int64_t block = target_->block();
  for (int64_t b = 0; b < n_ / block; ++b) {
    const std::string why =
        target_->convert(*source_, b * block, to_codes + b * block, to_stored + b * target_->params());
    if (!why.empty()) return "block " + std::to_string(b) + ": " + why;
  }
  return "";
}

}  // namespace qat::grid
