#include "loadtest/generator/schedule.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace dejavu {

std::optional<ArrivalKind> ParseArrivalKind(absl::string_view name) {
  if (name == "constant") return ArrivalKind::kConstant;
  if (name == "poisson") return ArrivalKind::kPoisson;
  if (name == "gamma") return ArrivalKind::kGamma;
  return std::nullopt;
}

Arrivals::Arrivals(const ArrivalOptions& options) : options_(options), random_(options.seed) {
  if (options_.kind == ArrivalKind::kConstant) return;
  double sum_s = 0.0;
  for (int64_t i = 0; i <= options_.count; ++i) sum_s += Gap();
  scale_ = static_cast<double>(options_.count) / options_.rate / sum_s;
  random_.seed(options_.seed);
}

std::optional<double> Arrivals::Next() {
  if (made_ == options_.count) return std::nullopt;
  const int64_t before = made_++;
  // Multiplied, not added up: a million sums would drift.
  if (options_.kind == ArrivalKind::kConstant) return static_cast<double>(before) / options_.rate;
  return now_s_ += scale_ * Gap();
}

double Arrivals::Gap() {
  if (options_.kind == ArrivalKind::kPoisson) return std::exponential_distribution<double>()(random_);
  return std::gamma_distribution<double>(options_.burstiness)(random_);
}

absl::StatusOr<Ramp> ParseRamp(absl::string_view text) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  Ramp ramp;
  if (parts.size() != 3 || !absl::SimpleAtod(parts[0], &ramp.from) || !absl::SimpleAtod(parts[1], &ramp.to) ||
      !absl::SimpleAtoi(parts[2], &ramp.steps) || !(ramp.from > 0.0) || !(ramp.to >= ramp.from && ramp.to <= 1e6) ||
      ramp.steps < 1 || ramp.steps > 1000) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not FROM:TO:STEPS with 0 < FROM <= TO <= 1e6 and 1 to 1000 steps"));
  }
  return ramp;
}

}  // namespace dejavu
