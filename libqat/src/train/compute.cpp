#include "qat/train/compute.hpp"

#include <ATen/autocast_mode.h>

#include <string>

#include "qat/core/error.hpp"

namespace qat::train {
namespace {

bool cpu_multiplies_bfloat16() noexcept {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") || __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

}  // namespace

ComputeScope::ComputeScope(at::ScalarType dtype, at::Device device)
    : device_(device.type()),
      active_(dtype != at::kFloat),
      enabled_before_(active_ && at::autocast::is_autocast_enabled(device_)),
      dtype_before_(active_ ? at::autocast::get_autocast_dtype(device_) : at::kFloat) {
  if (!active_) return;
  at::autocast::set_autocast_enabled(device_, true);
  at::autocast::set_autocast_dtype(device_, dtype);
  at::autocast::increment_nesting();
}

ComputeScope::~ComputeScope() {
  if (!active_) return;
  // Casts are cached by parameter; the next step has other parameters in the same place.
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  at::autocast::set_autocast_dtype(device_, dtype_before_);
  at::autocast::set_autocast_enabled(device_, enabled_before_);
}

at::ScalarType compute_dtype(std::string_view name, at::Device device) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "auto") return !device.is_cpu() || cpu_multiplies_bfloat16() ? at::kBFloat16 : at::kFloat;
  throw ArgumentError("compute_dtype: expected one of auto, float32, bfloat16, got \"" + std::string(name) +
                      "\"");
}

}  // namespace qat::train
