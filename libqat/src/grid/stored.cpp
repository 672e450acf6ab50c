#include "qat/grid/stored.hpp"

#include <array>
#include <cstring>

#include "qat/grid/bf16.hpp"
#include "qat/grid/e4m3.hpp"
#include "qat/grid/e8m0.hpp"
#include "qat/grid/f16.hpp"

namespace qat::grid {

void put_stored(float value, DType dtype, uint8_t* bytes) noexcept {
  const auto put = [bytes](const auto& stored) { std::memcpy(bytes, &stored, sizeof stored); };
  switch (dtype) {
    case DType::kF32:
      return put(value);
    case DType::kF16:
      return put(f16_bits(value));
    case DType::kBF16:
      return put(bf16_bits(value));
    case DType::kU8:
      return put(static_cast<uint8_t>(value));
    case DType::kI8:
      return put(static_cast<int8_t>(value));
    case DType::kE8M0:
      return put(e8m0_bits(value));
    case DType::kE4M3:
      return put(e4m3_bits(value));
  }
}

float get_stored(const uint8_t* bytes, DType dtype) noexcept {
  const auto get = [bytes](auto stored) {
    std::memcpy(&stored, bytes, sizeof stored);
    return stored;
  };
  switch (dtype) {
    case DType::kF32:
      return get(float{});
    case DType::kF16:
      return f16_value(get(uint16_t{}));
    case DType::kBF16:
      return bf16_value(get(uint16_t{}));
    case DType::kU8:
      return static_cast<float>(*bytes);
    case DType::kI8:
      return static_cast<float>(get(int8_t{}));
    case DType::kE8M0:
      return e8m0_value(*bytes);
    case DType::kE4M3:
      return e4m3_value(*bytes);
  }
  return 0.0F;
}

int first_not_stored(const Grid& grid, const float* stored) noexcept {
  std::array<float, kMaxParams> again{};
  const int64_t n = grid.info().block > 0 ? grid.info().block : 1;
  const Status status = grid.store(stored, n, again.data());
  for (int i = 0; i < grid.params(); ++i) {
    if (!is_finite(stored[i]) || bits_of(stored[i]) != bits_of(again[static_cast<size_t>(i)])) return i;
  }
  return status == Status::kOk ? -1 : 0;
}

}  // namespace qat::grid
