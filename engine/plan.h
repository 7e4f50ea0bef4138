// Plan: what `dejavud --plan` prints. Nothing is loaded and no device is touched. Any thread.
#ifndef ENGINE_PLAN_H_
#define ENGINE_PLAN_H_

#include <string>

#include "absl/status/statusor.h"
#include "engine/options.h"
#include "engine/plan_options.h"
#include "engine/sparsity.h"

namespace dejavu {

struct Plan {
  std::string text;  // a table for people, or JSON
  bool fits = false;
};

// Of the model of `options`, with the tiers from `highest` to `lowest`. NOT_FOUND and INVALID_ARGUMENT with the reason.
absl::StatusOr<Plan> MakePlan(const EngineOptions& options, Tier highest, Tier lowest, const PlanOptions& devices);

}  // namespace dejavu

#endif  // ENGINE_PLAN_H_
