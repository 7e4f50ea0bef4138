#include "engine/serving/fault.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace dejavu {

absl::StatusOr<Fault> ParseFault(const std::string& text) {
  if (text.empty()) return Fault();
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits('@', 1));
  int64_t value = 0;
  if (absl::SimpleAtoi(parts.second, &value) && value >= 1) {
    if (parts.first == "throw") return Fault{.kind = Fault::Kind::kThrow, .step = value};
    if (parts.first == "hang") return Fault{.kind = Fault::Kind::kHang, .step = value};
    if (parts.first == "slow") return Fault{.kind = Fault::Kind::kSlow, .delay_ms = value};
  }
  return absl::InvalidArgumentError(
      absl::StrCat("fault is '", text, "'; it must be throw@STEP, hang@STEP or slow@MS, from 1"));
}

}  // namespace dejavu
