#include "loadtest/generator/result.h"

#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "loadtest/client/status_code.h"
#include "loadtest/generator/statistics.h"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMaxSamples = 2000;

// What is only drawn needs no more digits.
Json Rounded(double value) {
  if (!std::isfinite(value)) return nullptr;
  if (value == 0.0) return 0.0;
  const double scale = std::pow(10.0, 4 - static_cast<int>(std::floor(std::log10(std::fabs(value)))));
  return std::round(value * scale) / scale;
}

Json OrNull(std::optional<double> value) { return value ? Json(*value) : Json(); }

// The latencies of the requests that count, in ascending order.
struct Latencies {
  std::vector<float> ttft, tpot, e2el, itl;
  TimeHistogram itl_histogram;
  int64_t completed = 0, failed = 0, good = 0;
  int64_t prompt_tokens = 0, tokens = 0;
  double density_sum = 0.0;
  int64_t densities = 0;
};

void Add(const Record& r, Latencies* l) {
  if (r.kind != RequestKind::kNormal) return;
  if (static_cast<grpc::StatusCode>(r.code) != grpc::StatusCode::OK) {
    ++l->failed;
    return;
  }
  ++l->completed;
  l->good += r.good;
  l->prompt_tokens += r.prompt_tokens;
  l->tokens += r.tokens;
  l->e2el.push_back(r.e2el_ms);
  if (!std::isnan(r.ttft_ms)) l->ttft.push_back(r.ttft_ms);
  if (!std::isnan(r.tpot_ms)) l->tpot.push_back(r.tpot_ms);
  if (!std::isnan(r.density)) {
    l->density_sum += r.density;
    ++l->densities;
  }
}

void Sort(Latencies* l) {
  for (std::vector<float>* values : {&l->ttft, &l->tpot, &l->e2el, &l->itl}) std::sort(values->begin(), values->end());
}

// Of one tier, or of all.
Latencies Collect(const Recorder& recorder, std::optional<int> tier) {
  Latencies l;
  for (const Record& r : recorder.records()) {
    if (!tier || r.tier == *tier) Add(r, &l);
  }
  for (int t = 0; t < kTiers; ++t) {
    if (tier && t != *tier) continue;
    const Gaps& gaps = recorder.gaps()[t];
    l.itl.insert(l.itl.end(), gaps.values().begin(), gaps.values().end());
    l.itl_histogram.Merge(gaps.histogram());
  }
  Sort(&l);
  return l;
}

void AddLatencies(const Latencies& l, bool gaps_are_exact, Json* json) {
  AddSummary("ttft", l.ttft, json);
  AddSummary("tpot", l.tpot, json);
  if (gaps_are_exact) {
    AddSummary("itl", l.itl, json);
  } else {
    AddSummary("itl", l.itl_histogram, json);
  }
  AddSummary("e2el", l.e2el, json);
}

Json BucketsJson(const TimeHistogram& histogram) {
  Json json = Json::array();
  for (const auto& [upper_ms, count] : histogram.Buckets()) json.push_back({Rounded(upper_ms), count});
  return json;
}

Json BucketsJson(const std::vector<float>& values) {
  TimeHistogram histogram;
  for (const float value : values) histogram.Add(value);
  return BucketsJson(histogram);
}

Json LagJson(const Recorder& recorder) {
  std::vector<float> lags;
  for (const Record& r : recorder.records()) lags.push_back(r.lag_ms);
  if (lags.empty()) return nullptr;
  std::sort(lags.begin(), lags.end());
  return {{"p50", Percentile(lags, 0.5)},
          {"p99", Percentile(lags, 0.99)},
          {"p99.9", Percentile(lags, 0.999)},
          {"max", lags.back()}};
}

Json InvalidBecause(const RunFacts& facts, const Json& lag_ms, int64_t completed) {
  Json reasons = Json::array();
  if (!lag_ms.is_null() && lag_ms["p99"].get<double>() > kMaxLagP99Ms) {
    reasons.push_back(absl::StrFormat("sends were late: 99 %% within %.3f ms of their time; the limit is %.0f ms",
                                      lag_ms["p99"].get<double>(), kMaxLagP99Ms) +
                      (facts.sending.realtime ? "" : " (with CAP_SYS_NICE, other work could not hold them up)"));
  }
  if (facts.sending.dropped > 0) {
    reasons.push_back(absl::StrFormat("%d sends were dropped because %d requests were under way", facts.sending.dropped,
                                      facts.plan.max_in_flight));
  }
  if (facts.interrupted) reasons.push_back("it was interrupted");
  if (completed == 0) reasons.push_back("no request was answered");
  return reasons;
}

Json TimelineJson(const Recorder& recorder) {
  Json json = Json::array();
  int64_t running = 0;
  double t_s = 0.0;
  for (const Recorder::Interval& i : recorder.intervals()) {
    running += i.sent - i.ended;
    const auto percentile = [](const TimeHistogram& histogram, double share) {
      const std::optional<double> ms = histogram.QuantileMs(share);
      return ms ? Rounded(*ms) : Json();
    };
    json.push_back({{"t_s", Rounded(t_s)},
                    {"interval_s", recorder.interval_s()},
                    {"sent", i.sent},
                    {"completed", i.completed},
                    {"failed", i.failed},
                    {"running", running},
                    {"p50_ttft_ms", percentile(i.ttft, 0.5)},
                    {"p99_ttft_ms", percentile(i.ttft, 0.99)},
                    {"p50_itl_ms", percentile(i.itl, 0.5)},
                    {"p99_itl_ms", percentile(i.itl, 0.99)},
                    {"max_itl_ms", i.itl.count() > 0 ? Rounded(i.itl.max_ms()) : Json()},
                    {"tokens", i.tokens}});
    t_s += recorder.interval_s();
  }
  return json;
}

// Evenly spread over the requests, in the order of their ends.
Json SampleJson(const std::vector<Record>& records) {
  Json json = Json::array();
  const size_t step = std::max<size_t>(1, (records.size() + kMaxSamples - 1) / kMaxSamples);
  for (size_t i = 0; i < records.size(); i += step) {
    const Record& r = records[i];
    if (r.kind != RequestKind::kNormal || static_cast<grpc::StatusCode>(r.code) != grpc::StatusCode::OK) continue;
    json.push_back({{"t_s", Rounded(r.scheduled_s)},
                    {"ttft_ms", Rounded(r.ttft_ms)},
                    {"tpot_ms", Rounded(r.tpot_ms)},
                    {"e2el_ms", Rounded(r.e2el_ms)},
                    {"tier", TierInReport(static_cast<v1::Tier>(r.tier))},
                    {"density", Rounded(r.density)},
                    {"tokens", r.tokens}});
  }
  return json;
}

Json ByTier(const Recorder& recorder, double duration_s) {
  Json json = Json::object();
  for (int tier = 0; tier < kTiers; ++tier) {
    const Latencies l = Collect(recorder, tier);
    if (l.completed + l.failed == 0) continue;
    Json& of_tier = json[TierInReport(static_cast<v1::Tier>(tier))];
    of_tier["completed"] = l.completed;
    of_tier["failed"] = l.failed;
    of_tier["goodput_share"] = static_cast<double>(l.good) / static_cast<double>(l.completed + l.failed);
    of_tier["output_throughput"] = static_cast<double>(l.tokens) / duration_s;
    of_tier["mean_density"] = l.densities > 0 ? Json(l.density_sum / static_cast<double>(l.densities)) : Json();
    AddLatencies(l, recorder.gaps_are_exact(), &of_tier);
  }
  return json;
}

void AddCounts(const std::vector<Record>& records, Json* json) {
  std::map<std::string, int64_t> codes, finishes;
  std::array<int64_t, 4> kinds{};
  int64_t prompt_tokens = 0, tokens = 0, bad_refused = 0;
  for (const Record& r : records) {
    const auto code = static_cast<grpc::StatusCode>(r.code);
    ++codes[CodeName(code)];
    ++finishes[FinishInReport(static_cast<v1::FinishReason>(r.finish))];
    ++kinds[static_cast<size_t>(r.kind)];
    prompt_tokens += r.prompt_tokens;
    tokens += r.tokens;
    bad_refused += r.kind == RequestKind::kBad && code == grpc::StatusCode::INVALID_ARGUMENT;
  }
  (*json)["by_code"] = codes;
  (*json)["by_finish"] = finishes;
  (*json)["misbehaved"] = {{"cancelled", kinds[static_cast<size_t>(RequestKind::kCancelled)]},
                           {"slow_readers", kinds[static_cast<size_t>(RequestKind::kSlowReader)]},
                           {"bad", kinds[static_cast<size_t>(RequestKind::kBad)]},
                           {"bad_refused", bad_refused}};
  (*json)["totals"] = {
      {"requests", records.size()}, {"by_code", codes}, {"prompt_tokens", prompt_tokens}, {"tokens", tokens}};
}

const char* KindName(ArrivalKind kind) {
  return kind == ArrivalKind::kConstant ? "constant" : kind == ArrivalKind::kPoisson ? "poisson" : "gamma";
}

Json ArrivalsJson(const SendPlan& plan, uint64_t seed) {
  if (plan.concurrency > 0) return {{"kind", "closed"}, {"seed", seed}};
  if (plan.replay) return {{"kind", "replay"}, {"speed", plan.replay_speed}, {"seed", seed}};
  return {{"kind", KindName(plan.arrivals->kind)},
          {"rate", plan.arrivals->rate},
          {"burstiness", plan.arrivals->burstiness},
          {"seed", seed}};
}

Json ClientJson(const RunFacts& facts, double duration_s) {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return {{"cpu_s", facts.cpu_s},
          {"cpu_share", facts.cpu_s / duration_s},
          {"max_rss_mb", static_cast<double>(usage.ru_maxrss) / 1024.0},
          {"realtime_pacing", facts.sending.realtime}};
}

// What several keys are formed from.
struct Totals {
  Latencies all;
  bool closed;  // closed loop
  int64_t sent, dropped;
  double duration_s;  // to the last end, or to that of the sending where nothing was due before it
  double window_s;    // of the sending
  double offered_rate;
  Json lag_ms;  // of an open loop
};

Totals AddUp(const RunFacts& facts, const Recorder& recorder) {
  Totals t;
  t.all = Collect(recorder, std::nullopt);
  t.closed = facts.plan.concurrency > 0;
  t.sent = facts.sending.sent;
  t.dropped = facts.sending.dropped;
  t.duration_s = std::max({1e-9, Seconds(recorder.start(), recorder.last_end()), facts.sending.window_s});
  t.window_s = std::max(1e-9, facts.sending.window_s);
  t.offered_rate = static_cast<double>(t.sent + t.dropped) / t.window_s;
  if (!t.closed) t.lag_ms = LagJson(recorder);
  return t;
}

// Whether it is to be believed, and what was run.
void AddHeading(const RunOptions& options, const Target& target, const RunFacts& facts, const Totals& t, Json* json) {
  Json& r = *json;
  const Json invalid_because = InvalidBecause(facts, t.lag_ms, t.all.completed);
  r["valid"] = invalid_because.empty();
  r["invalid_because"] = invalid_because;
  r["loop"] = t.closed ? "closed" : "open";
  r["date"] = absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::Now(), absl::UTCTimeZone());
  r["endpoint_type"] = "dejavu";
  r["backend"] = "dejavu";
  r["label"] = options.label;
  r["model_id"] = target.model.model();
  r["tokenizer_id"] = target.model.has_tokenizer() ? Json(target.model.model()) : Json();
}

// The figures of `vllm bench serve`.
void AddFigures(const RunFacts& facts, const Recorder& recorder, const Totals& t, Json* json) {
  Json& r = *json;
  const auto per_second = [&](auto count) { return static_cast<double>(count) / t.duration_s; };
  const std::optional<ArrivalOptions>& arrivals = facts.plan.arrivals;
  r["num_prompts"] = t.sent;
  r["request_rate"] = t.closed ? Json("inf") : Json(arrivals ? arrivals->rate : t.offered_rate);
  r["burstiness"] = arrivals ? Json(arrivals->burstiness) : Json();
  r["max_concurrency"] = t.closed ? facts.plan.concurrency : facts.plan.max_in_flight;
  r["duration"] = t.duration_s;
  r["completed"] = t.all.completed;
  r["failed"] = t.all.failed;
  r["total_input_tokens"] = t.all.prompt_tokens;
  r["total_output_tokens"] = t.all.tokens;
  r["request_throughput"] = per_second(t.all.completed);
  r["request_goodput"] = per_second(t.all.good);
  r["output_throughput"] = per_second(t.all.tokens);
  r["total_token_throughput"] = per_second(t.all.tokens + t.all.prompt_tokens);
  AddLatencies(t.all, recorder.gaps_are_exact(), &r);
  r["itl_exact"] = recorder.gaps_are_exact();
}

// What was asked of the generator, and whether it kept to it.
void AddLoad(const RunOptions& options, const RunFacts& facts, const Totals& t, Json* json) {
  Json& r = *json;
  r["arrivals"] = ArrivalsJson(facts.plan, options.seed);
  if (facts.ramp) {
    r["ramp"] = {
        {"from", facts.ramp->from}, {"to", facts.ramp->to}, {"steps", facts.ramp->steps}, {"step", facts.step}};
  }
  r["lag_ms"] = t.lag_ms;
  r["dropped"] = t.dropped;
  r["abandoned"] = facts.abandoned;
  r["offered_rate"] = t.closed ? Json() : Json(t.offered_rate);
  r["achieved_rate"] = static_cast<double>(t.sent) / std::max(t.window_s, facts.sending.sending_s);
  r["warmup"] = {{"s", options.warmup_s}, {"requests", facts.warmup_requests}};
  r["client"] = ClientJson(facts, t.duration_s);
}

void AddGoodput(const Objectives& objectives, const Totals& t, Json* json) {
  (*json)["objectives"] = {{"ttft_ms", OrNull(objectives.ttft_ms)},
                           {"tpot_ms", OrNull(objectives.tpot_ms)},
                           {"itl_p99_ms", OrNull(objectives.itl_p99_ms)},
                           {"e2el_ms", OrNull(objectives.e2el_ms)}};
  // What was to be sent and was not is as bad as what failed.
  const int64_t wanted = t.all.completed + t.all.failed + t.dropped;
  (*json)["goodput_share"] = wanted > 0 ? Json(static_cast<double>(t.all.good) / static_cast<double>(wanted)) : Json();
}

// What the page draws.
void AddDetails(const RunOptions& options, const Recorder& recorder, const Totals& t, Json* json) {
  Json& r = *json;
  r["intervals"] = {{"ttft", BootstrapIntervals(t.all.ttft, options.seed)},
                    {"tpot", BootstrapIntervals(t.all.tpot, options.seed)},
                    {"itl", BootstrapIntervals(t.all.itl, options.seed)},
                    {"e2el", BootstrapIntervals(t.all.e2el, options.seed)}};
  AddCounts(recorder.records(), &r);
  r["by_tier"] = ByTier(recorder, t.duration_s);
  r["histograms"] = {{"ttft", BucketsJson(t.all.ttft)},
                     {"itl", BucketsJson(t.all.itl_histogram)},
                     {"tpot", BucketsJson(t.all.tpot)},
                     {"e2el", BucketsJson(t.all.e2el)}};
  r["timeline_interval_s"] = recorder.interval_s();
  r["timeline"] = TimelineJson(recorder);
  r["requests_sample"] = SampleJson(recorder.records());
}

}  // namespace

Json MakeResult(const RunOptions& options, Json config, const Target& target, const RunFacts& facts,
                const Objectives& objectives, const Recorder& recorder) {
  const Totals totals = AddUp(facts, recorder);
  Json result;
  AddHeading(options, target, facts, totals, &result);
  AddFigures(facts, recorder, totals, &result);
  AddLoad(options, facts, totals, &result);
  AddGoodput(objectives, totals, &result);
  AddDetails(options, recorder, totals, &result);
  result["server"] = {{"info", InfoJson(target.server)}};
  result["config"] = std::move(config);
  return result;
}

}  // namespace dejavu
