#include "engine/serving/fault.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace dejavu {

absl::StatusOr<Fault> ParseFault(const std::string& text) {
  Fault fault;
  if (text.empty()) return fault;
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits('@', 1));
  fault.hang = parts.first == "hang";
  if ((parts.first != "throw" && parts.first != "hang") || !absl::SimpleAtoi(parts.second, &fault.step) ||
      fault.step < 1) {
    return absl::InvalidArgumentError(absl::StrCat("fault is '", text, "'; it must be throw@STEP or hang@STEP"));
  }
  return fault;
}

}  // namespace dejavu
