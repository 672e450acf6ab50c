#include "qat/version.hpp"

namespace qat {

const char* version() noexcept {
  return QAT_VERSION;
}

}  // namespace qat
