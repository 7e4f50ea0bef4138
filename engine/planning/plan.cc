#include "engine/plan.h"

#include "engine/planning/capacity_plan.h"
#include "engine/planning/capacity_report.h"
#include "kernels/base/status_macros.h"

namespace dejavu {

absl::StatusOr<Plan> MakePlan(const EngineOptions& options, Tier highest, Tier lowest, const PlanOptions& devices) {
  ASSIGN_OR_RETURN(const PlannedModel model, DescribeModel(options, highest, lowest));
  ASSIGN_OR_RETURN(const CapacityPlan plan, PlanCapacity(model, options, devices));
  return Plan{devices.json ? CapacityJson(plan) : CapacityText(plan), plan.fits};
}

}  // namespace dejavu
