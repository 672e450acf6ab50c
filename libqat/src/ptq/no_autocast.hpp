#pragma once

#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace qat::ptq {

/// Keeps products in their own dtype for its lifetime, whatever autocast does to the model's: a second moment
/// that was rounded to bfloat16 is not even positive definite.
class NoAutocast {
 public:
  NoAutocast() : guard_(c10::autocast_dispatch_keyset) {}

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_;
};

}  // namespace qat::ptq
