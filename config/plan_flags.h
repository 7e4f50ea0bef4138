// PlanFlags: the flags of --plan, which are no keys of the configuration. One thread.
#ifndef CONFIG_PLAN_FLAGS_H_
#define CONFIG_PLAN_FLAGS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/plan_options.h"

namespace CLI {
class App;
}

namespace dejavu {

// What the flags of --plan say, before the device's kind fills in what they leave out.
struct PlanFlags {
  std::string format;  // empty: no plan
  PlanOptions options;

  void AddTo(CLI::App* app);
  // INVALID_ARGUMENT where neither a flag nor the kind of device says what is needed.
  absl::StatusOr<PlanOptions> Complete() const;
};

// For --plan-device.
std::vector<std::string> DeviceKindNames();

}  // namespace dejavu

#endif  // CONFIG_PLAN_FLAGS_H_
