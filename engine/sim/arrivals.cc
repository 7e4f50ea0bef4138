#include "engine/sim/arrivals.h"

#include <algorithm>
#include <cmath>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace dejavu {
namespace {

// "name=number".
std::vector<std::pair<std::string, double>> Parse(const char* flag, const std::vector<std::string>& entries) {
  std::vector<std::pair<std::string, double>> parsed;
  for (const std::string& entry : entries) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(entry, absl::MaxSplits('=', 1));
    double value = 0.0;
    if (parts.first.empty() || !absl::SimpleAtod(parts.second, &value) || !(value >= 0.0 && value <= 1e9)) {
      throw CLI::ValidationError(flag, absl::StrCat("'", entry, "' is not NAME=NUMBER"));
    }
    parsed.emplace_back(parts.first, value);
  }
  return parsed;
}

Urgency ParseUrgency(const std::string& name) {
  for (int u = 0; u < kUrgencies; ++u) {
    if (name == Name(static_cast<Urgency>(u))) return static_cast<Urgency>(u);
  }
  throw CLI::ValidationError("urgency", absl::StrCat("'", name, "' is not interactive, normal or batch"));
}

Tier TierOf(const std::string& name) {
  const std::optional<Tier> tier = ParseTier(name);
  if (!tier.has_value()) throw CLI::ValidationError("tier", absl::StrCat("'", name, "' is not a tier"));
  return *tier;
}

}  // namespace

DrawnArrivals::DrawnArrivals(const SimArrivalOptions& options, int32_t context)
    : options_(options), context_(context), tier_(TierOf(options.tier)), random_(options.seed) {
  for (const auto& [name, share] : Parse("--mix", options.mix)) mix_.emplace_back(ParseUrgency(name), share);
  if (mix_.empty()) mix_.emplace_back(Urgency::kNormal, 1.0);
  tenants_ = Parse("--tenant", options.tenants);
  if (tenants_.empty()) tenants_.emplace_back("", 1.0);
}

std::optional<SimRequest> DrawnArrivals::Next() {
  const double shape = 1.0 / (options_.burstiness * options_.burstiness);
  now_s_ += std::gamma_distribution<double>(shape, 1.0 / (options_.rate * shape))(random_);
  if (options_.requests > 0 ? made_ >= options_.requests : now_s_ > options_.seconds) return std::nullopt;
  ++made_;
  SimRequest r;
  r.arrival_s = now_s_;
  r.prompt_tokens = Length(options_.prompt_tokens, context_ / 2);
  r.output_tokens = r.max_new_tokens = Length(options_.output_tokens, context_ - r.prompt_tokens);
  r.urgency = Draw(mix_);
  r.tenant = Draw(tenants_);
  r.tier = tier_;
  r.deadline_s = options_.deadline_s;
  return r;
}

int32_t DrawnArrivals::Length(double mean, int32_t most) {
  const double sigma = options_.spread, mu = std::log(mean) - sigma * sigma / 2.0;
  return static_cast<int32_t>(std::clamp(std::lognormal_distribution<double>(mu, sigma)(random_), 1.0, double(most)));
}

template <typename T>
T DrawnArrivals::Draw(const Shares<T>& shares) {
  double total = 0.0;
  for (const auto& share : shares) total += share.second;
  double at = std::uniform_real_distribution<double>(0.0, total)(random_);
  for (const auto& share : shares) {
    if ((at -= share.second) <= 0.0) return share.first;
  }
  return shares.back().first;
}

TraceArrivals::TraceArrivals(const std::string& path) : path_(path), in_(path) {
  std::string header;
  if (!in_) throw CLI::FileError(absl::StrCat("cannot read ", path));
  if (!std::getline(in_, header) || header != kTraceHeader) {
    throw CLI::FileError(absl::StrCat(path, ": the first line must be ", kTraceHeader));
  }
}

std::optional<SimRequest> TraceArrivals::Next() {
  std::string line;
  if (!std::getline(in_, line)) return std::nullopt;
  ++line_;
  const std::vector<std::string> cells = absl::StrSplit(line, ',');
  SimRequest r;
  if (cells.size() != 7 || !absl::SimpleAtod(cells[0], &r.arrival_s) || !absl::SimpleAtoi(cells[1], &r.prompt_tokens) ||
      !absl::SimpleAtoi(cells[2], &r.output_tokens) ||
      (!cells[6].empty() && !absl::SimpleAtod(cells[6], &r.deadline_s)) || r.prompt_tokens < 1 || r.output_tokens < 1 ||
      !(r.arrival_s >= last_s_)) {
    throw CLI::FileError(
        absl::StrCat(path_, ":", line_, ": '", line, "' is not a row of ", kTraceHeader, " in order of arrival"));
  }
  last_s_ = r.arrival_s;
  r.max_new_tokens = r.output_tokens;
  r.urgency = cells[3].empty() ? Urgency::kNormal : ParseUrgency(cells[3]);
  r.tenant = cells[4];
  r.tier = cells[5].empty() ? Tier::kDense : TierOf(cells[5]);
  return r;
}

}  // namespace dejavu
