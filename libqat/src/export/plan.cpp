#include "qat/export/plan.hpp"

#include "export/targets.hpp"

namespace qat {

ExportPlan plan_export(const QuantizedCheckpoint& checkpoint, std::string_view target,
                       std::string_view dtype) {
  const Target& known = find_target("plan_export", target);
  return known.plan(placed(checkpoint, known), dtype);
}

}  // namespace qat
