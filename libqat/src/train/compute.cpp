#include "train/compute.hpp"

#include <ATen/autocast_mode.h>

#include "qat/train/options.hpp"

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

ComputeScope::ComputeScope(at::Device device, at::ScalarType dtype)
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

std::string resolve_compute_dtype(const std::string& name, at::Device device) {
  if (name != "auto") return name;
  return !device.is_cpu() || cpu_multiplies_bfloat16() ? "bfloat16" : "float32";
}

}  // namespace qat::train
