#include "qat/nn/without_initialization.hpp"

namespace qat::nn {
namespace {

thread_local bool skipping = false;

}  // namespace

WithoutInitialization::WithoutInitialization() noexcept : before_(skipping) {
  skipping = true;
}

WithoutInitialization::~WithoutInitialization() {
  skipping = before_;
}

bool WithoutInitialization::active() noexcept {
  return skipping;
}

}  // namespace qat::nn
