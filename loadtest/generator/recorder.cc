#include "loadtest/generator/recorder.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "loadtest/client/names.h"
#include "loadtest/client/status_code.h"

namespace dejavu {
namespace {

constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
// The timeline begins with tenths of a second and coarsens as the run goes on.
constexpr size_t kFineIntervals = 200;
constexpr size_t kMaxIntervals = 3600;
constexpr double kFine_s = 0.1, kCoarse_s = 1.0;

// The shortest text that reads as the same number; null for NaN.
template <typename Number>
void AppendNumber(Number value, std::string* text) {
  if (!std::isfinite(value)) {
    text->append("null");
    return;
  }
  char buffer[32];
  text->append(buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr);
}

// The 99th percentile of a request's own gaps, the smallest that 99 % do not exceed.
double Percentile99(std::vector<float> gaps) {
  const size_t rank = (gaps.size() * 99 + 99) / 100 - 1;
  std::nth_element(gaps.begin(), gaps.begin() + static_cast<ptrdiff_t>(rank), gaps.end());
  return gaps[rank];
}

bool Within(double value, std::optional<double> limit) { return !limit || !std::isfinite(value) || value <= *limit; }

}  // namespace

std::string FinishInReport(v1::FinishReason reason) {
  return reason == v1::FINISH_REASON_UNSPECIFIED ? "none" : FinishReasonName(reason);
}

std::string TierInReport(v1::Tier tier) { return tier == v1::TIER_UNSPECIFIED ? "default" : TierName(tier); }

absl::StatusOr<Objectives> ParseObjectives(const std::vector<std::string>& entries) {
  Objectives objectives;
  for (const std::string& entry : entries) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(entry, absl::MaxSplits(':', 1));
    std::optional<double>* target = parts.first == "ttft"      ? &objectives.ttft_ms
                                    : parts.first == "tpot"    ? &objectives.tpot_ms
                                    : parts.first == "itl_p99" ? &objectives.itl_p99_ms
                                    : parts.first == "e2el"    ? &objectives.e2el_ms
                                                               : nullptr;
    double ms = 0.0;
    if (target == nullptr || !absl::SimpleAtod(parts.second, &ms) || !(ms > 0.0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--goodput: '", entry, "' is not ttft:MS, tpot:MS, itl_p99:MS or e2el:MS"));
    }
    *target = ms;
  }
  return objectives;
}

absl::StatusOr<std::unique_ptr<Recorder>> Recorder::Create(const Objectives& objectives, const std::string& jsonl,
                                                           bool append) {
  std::unique_ptr<Recorder> recorder(new Recorder(objectives));
  if (jsonl.empty()) return recorder;
  recorder->path_ = jsonl;
  recorder->file_ = std::fopen(jsonl.c_str(), append ? "a" : "w");
  if (recorder->file_ == nullptr) {
    return absl::UnknownError(absl::StrCat("cannot write ", jsonl, ": ", std::strerror(errno)));
  }
  return recorder;
}

Recorder::~Recorder() {
  if (file_ != nullptr) std::fclose(file_);
}

absl::Status Recorder::Finish() {
  if (file_ == nullptr) return absl::OkStatus();
  const bool closed = std::fclose(file_) == 0;
  file_ = nullptr;
  if (closed && !write_failed_) return absl::OkStatus();
  return absl::UnknownError(absl::StrCat("cannot write ", path_, ": ", std::strerror(errno)));
}

Record Recorder::Summarise(const Outcome& o) const {
  Record r;
  r.scheduled_s = SinceStart(o.scheduled);
  r.lag_ms = static_cast<float>(Milliseconds(o.scheduled, o.sent));
  r.ttft_ms = o.tokens > 0 ? static_cast<float>(Milliseconds(o.scheduled, o.first_token)) : kNone;
  r.e2el_ms = static_cast<float>(Milliseconds(o.scheduled, o.ended));
  r.tpot_ms = o.tokens > 1 ? static_cast<float>(Milliseconds(o.first_token, o.last_token) / (o.tokens - 1)) : kNone;
  r.density = o.density < 0.0f ? kNone : o.density;
  r.prompt_tokens = o.prompt_tokens;
  r.tokens = o.tokens;
  r.tier = static_cast<uint8_t>(o.tier < kTiers ? o.tier : v1::TIER_UNSPECIFIED);
  r.code = static_cast<uint8_t>(o.code);
  r.finish = static_cast<uint8_t>(o.finish);
  r.kind = o.kind;
  r.good = o.kind == RequestKind::kNormal && o.code == grpc::StatusCode::OK && Within(r.ttft_ms, objectives_.ttft_ms) &&
           Within(r.tpot_ms, objectives_.tpot_ms) && Within(r.e2el_ms, objectives_.e2el_ms) &&
           (!objectives_.itl_p99_ms || o.gaps_ms.empty() || Percentile99(o.gaps_ms) <= *objectives_.itl_p99_ms);
  return r;
}

std::string Recorder::Line(const Outcome& o, const Record& r) const {
  std::string line;
  const auto number = [&line](const char* key, auto value) {
    line.append(key);
    AppendNumber(value, &line);
  };
  absl::StrAppend(&line, "{\"id\":", o.id);
  number(",\"scheduled_s\":", r.scheduled_s);
  number(",\"sent_s\":", SinceStart(o.sent));
  number(",\"first_token_s\":", o.tokens > 0 ? SinceStart(o.first_token) : static_cast<double>(kNone));
  number(",\"end_s\":", SinceStart(o.ended));
  number(",\"lag_ms\":", r.lag_ms);
  number(",\"ttft_ms\":", r.ttft_ms);
  number(",\"e2el_ms\":", r.e2el_ms);
  number(",\"tpot_ms\":", r.tpot_ms);
  line.append(",\"itl_ms\":[");
  for (size_t i = 0; i < o.gaps_ms.size(); ++i) {
    if (i > 0) line.push_back(',');
    AppendNumber(o.gaps_ms[i], &line);
  }
  absl::StrAppend(&line, "],\"prompt_tokens\":", o.prompt_tokens, ",\"tokens\":", o.tokens, ",\"tier\":\"",
                  TierInReport(o.tier), "\"");
  number(",\"density\":", r.density);
  absl::StrAppend(&line, ",\"code\":\"", CodeName(o.code), "\",\"finish\":\"", FinishInReport(o.finish),
                  "\",\"kind\":\"", Name(o.kind), "\",\"good\":", r.good ? "true" : "false", "}\n");
  return line;
}

Recorder::Interval& Recorder::At(double s) {
  const auto index = [&] { return static_cast<size_t>(std::max(0.0, s) / interval_s_); };
  const auto merge = [&](size_t factor) {
    std::vector<Interval> coarse((intervals_.size() + factor - 1) / factor);
    for (size_t i = 0; i < intervals_.size(); ++i) {
      const Interval& from = intervals_[i];
      Interval& to = coarse[i / factor];
      to.sent += from.sent;
      to.completed += from.completed;
      to.failed += from.failed;
      to.ended += from.ended;
      to.tokens += from.tokens;
      to.ttft.Merge(from.ttft);
      to.itl.Merge(from.itl);
    }
    intervals_ = std::move(coarse);
    interval_s_ *= static_cast<double>(factor);
  };
  if (interval_s_ < kCoarse_s && index() >= kFineIntervals) {
    merge(static_cast<size_t>(std::lround(kCoarse_s / kFine_s)));
    interval_s_ = kCoarse_s;
  }
  while (index() >= kMaxIntervals) merge(2);
  if (index() >= intervals_.size()) intervals_.resize(index() + 1);
  return intervals_[index()];
}

void Recorder::AddToTimeline(const Outcome& o, const Record& r) {
  const bool normal = o.kind == RequestKind::kNormal, answered = normal && o.code == grpc::StatusCode::OK;
  At(SinceStart(o.sent)).sent += 1;
  Interval& end = At(SinceStart(o.ended));
  end.ended += 1;
  end.completed += answered;
  end.failed += normal && !answered;
  if (o.tokens == 0) return;
  double at_s = SinceStart(o.first_token);
  At(at_s).tokens += 1;
  if (answered) At(r.scheduled_s).ttft.Add(r.ttft_ms);
  for (const float gap : o.gaps_ms) {
    at_s += 1e-3 * static_cast<double>(gap);
    Interval& interval = At(at_s);
    interval.tokens += 1;
    if (answered) interval.itl.Add(gap);
  }
}

void Recorder::Add(const Outcome& outcome) {
  const Record record = Summarise(outcome);
  if (file_ != nullptr) {
    const std::string line = Line(outcome, record);
    const MutexLock lock(file_mutex_);
    write_failed_ = std::fwrite(line.data(), 1, line.size(), file_) != line.size() || write_failed_;
  }
  const MutexLock lock(mutex_);
  records_.push_back(record);
  last_end_ = std::max(last_end_, outcome.ended);
  AddToTimeline(outcome, record);
  const bool normal = record.kind == RequestKind::kNormal, answered = normal && outcome.code == grpc::StatusCode::OK;
  progress_.ended += 1;
  progress_.completed += answered;
  progress_.failed += normal && !answered;
  progress_.tokens += outcome.tokens;
  if (!answered) return;
  if (outcome.tokens > 0) progress_.ttft.Add(record.ttft_ms);
  Gaps& gaps = gaps_[record.tier];
  gap_count_ += static_cast<int64_t>(outcome.gaps_ms.size());
  for (const float gap : outcome.gaps_ms) gaps.Add(gap, gaps_are_exact_);
  if (gaps_are_exact_ && gap_count_ > kMaxExactGaps) {
    gaps_are_exact_ = false;
    for (Gaps& any : gaps_) any.Forget();
  }
}

Recorder::Progress Recorder::progress() {
  const MutexLock lock(mutex_);
  Progress progress = progress_;
  progress_.ttft = TimeHistogram();
  return progress;
}

}  // namespace dejavu
