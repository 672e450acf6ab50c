#include "qat/export/plan.hpp"

#include "export/targets.hpp"

namespace qat {

ExportPlan plan_export(const QuantizedCheckpoint& checkpoint, std::string_view target,
                       std::string_view dtype) {
  return find_target("plan_export", target).plan(checkpoint, dtype);
}

}  // namespace qat
