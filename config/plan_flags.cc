#include "config/plan_flags.h"

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"

namespace dejavu {

std::vector<std::string> DeviceKindNames() {
  std::vector<std::string> names;
  for (const DeviceKind& kind : kDeviceKinds) names.push_back(kind.name);
  return names;
}

void PlanFlags::AddTo(CLI::App* app) {
  CLI::Option* const plan = app->add_flag("--plan{text}", format)->check(CLI::IsMember({"text", "json"}));
  const auto add = [&](const char* name, auto* value) {
    return app->add_option(name, *value)->needs(plan)->multi_option_policy(CLI::MultiOptionPolicy::Throw);
  };
  constexpr double kMost = 1e6;
  add("--plan-device", &options.device)->check(CLI::IsMember(DeviceKindNames()));
  add("--plan-devices", &options.devices)->check(CLI::Range(1, kMaxPlanDevices));
  add("--plan-memory-gib", &options.memory_gib)->check(CLI::Range(0.001, kMost));
  add("--plan-bandwidth-gbs", &options.bandwidth_gbs)->check(CLI::Range(0.001, kMost));
  add("--plan-bandwidth-share", &options.bandwidth_share)->check(CLI::Range(0.001, 1.0));
  add("--plan-all-reduce-us", &options.all_reduce_us)->check(CLI::Range(0.0, kMost));
  add("--plan-context", &options.context_tokens)->check(CLI::Range(1, 1 << 20));
}

absl::StatusOr<PlanOptions> PlanFlags::Complete() const {
  PlanOptions plan = options;
  plan.json = format == "json";
  DeviceKind kind = {"", 0.0, 0.0, kDeviceKinds[0].all_reduce_us};
  for (const DeviceKind& known : kDeviceKinds) {
    if (plan.device == known.name) kind = known;
  }
  if (plan.memory_gib == 0.0) plan.memory_gib = kind.memory_gib;
  if (plan.bandwidth_gbs == 0.0) plan.bandwidth_gbs = kind.bandwidth_gbs;
  if (plan.all_reduce_us < 0.0) {
    plan.all_reduce_us = kind.all_reduce_us * (plan.devices > kDevicesOfHost ? kHostsFactor : 1.0);
  }
  const char* const missing = plan.memory_gib == 0.0      ? "--plan-memory-gib"
                              : plan.bandwidth_gbs == 0.0 ? "--plan-bandwidth-gbs"
                                                          : nullptr;
  if (missing == nullptr) return plan;
  return absl::InvalidArgumentError(plan.device.empty()
                                        ? absl::StrCat("--plan needs --plan-device or ", missing)
                                        : absl::StrCat("--plan-device ", plan.device, " needs ", missing));
}

}  // namespace dejavu
