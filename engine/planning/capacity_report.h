// CapacityPlan for people and for programs. Any thread.
#ifndef ENGINE_PLANNING_CAPACITY_REPORT_H_
#define ENGINE_PLANNING_CAPACITY_REPORT_H_

#include <string>

#include "engine/planning/capacity_plan.h"

namespace dejavu {

std::string CapacityText(const CapacityPlan& plan);
std::string CapacityJson(const CapacityPlan& plan);

}  // namespace dejavu

#endif  // ENGINE_PLANNING_CAPACITY_REPORT_H_
