// Fault: what the engine thread does to its steps, for tests of what happens then.
#ifndef ENGINE_SERVING_FAULT_H_
#define ENGINE_SERVING_FAULT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace dejavu {

struct Fault {
  enum class Kind { kNone, kThrow, kHang, kSlow };
  Kind kind = Kind::kNone;
  int64_t step = 0;      // kThrow and kHang: the step that breaks, from 1
  int64_t delay_ms = 0;  // kSlow: what every step takes longer
};

// "throw@STEP", "hang@STEP", "slow@MS", or nothing.
absl::StatusOr<Fault> ParseFault(const std::string& text);

}  // namespace dejavu

#endif  // ENGINE_SERVING_FAULT_H_
