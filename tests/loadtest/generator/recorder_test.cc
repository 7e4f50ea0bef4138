// What is made of measured times: histograms, percentiles, intervals, and the recorder that feeds them.
#include "loadtest/generator/recorder.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <random>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "loadtest/generator/statistics.h"
#include "nlohmann/json.hpp"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::HasSubstr;

std::vector<float> LogUniform(int count) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-2.0, 5.0);
  std::vector<float> values;
  for (int i = 0; i < count; ++i) values.push_back(static_cast<float>(std::pow(10.0, exponent(random))));
  std::sort(values.begin(), values.end());
  return values;
}

TEST(Histogram, ItsQuantilesAreWithinHalfAPercent) {
  const std::vector<float> values = LogUniform(20'001);
  TimeHistogram histogram;
  for (const float value : values) histogram.Add(value);
  for (const double share : {0.01, 0.5, 0.9, 0.99, 0.999}) {
    const double exact = Percentile(values, share);
    EXPECT_NEAR(*histogram.QuantileMs(share), exact, 0.006 * exact) << share;
  }
  EXPECT_EQ(histogram.max_ms(), values.back());
}

TEST(Histogram, ItsBucketsAreOnePercentWideAndHoldEverything) {
  const std::vector<float> values = LogUniform(20'000);
  TimeHistogram histogram;
  for (const float value : values) histogram.Add(value);
  size_t counted = 0;
  for (const auto& [upper_ms, count] : histogram.Buckets()) {
    const auto above = std::upper_bound(values.begin(), values.end(), upper_ms) - values.begin();
    const auto below = std::upper_bound(values.begin(), values.end(), upper_ms / 1.01) - values.begin();
    EXPECT_NEAR(static_cast<double>(above - below), static_cast<double>(count), 2.0);  // values on an edge
    counted += static_cast<size_t>(count);
  }
  EXPECT_EQ(counted, values.size());
}

TEST(Histogram, MergesToWhatOneWouldHold) {
  const std::vector<float> values = LogUniform(1'000);
  TimeHistogram one, low, high;
  for (size_t i = 0; i < values.size(); ++i) {
    one.Add(values[i]);
    (i < 300 ? low : high).Add(values[i]);
  }
  high.Merge(low);
  high.Merge(TimeHistogram());
  EXPECT_EQ(high.Buckets(), one.Buckets());
  EXPECT_DOUBLE_EQ(high.mean_ms(), one.mean_ms());
  EXPECT_NEAR(high.deviation_ms(), one.deviation_ms(), 1e-6 * one.deviation_ms());
}

TEST(Histogram, TakesNothingZeroAndForever) {
  TimeHistogram histogram;
  EXPECT_FALSE(histogram.QuantileMs(0.5).has_value());
  histogram.Add(0.0);
  EXPECT_EQ(*histogram.QuantileMs(0.5), 0.0);
  histogram.Add(1e12);
  EXPECT_EQ(histogram.count(), 2);
  EXPECT_EQ(histogram.max_ms(), 1e12);
}

TEST(Statistics, PercentilesInterpolateLikeNumpy) {
  const std::vector<float> values = {1.0f, 2.0f, 4.0f, 8.0f};
  EXPECT_DOUBLE_EQ(Percentile(values, 0.0), 1.0);
  EXPECT_DOUBLE_EQ(Percentile(values, 0.5), 3.0);
  EXPECT_DOUBLE_EQ(Percentile(values, 0.9), 6.8);  // numpy.percentile([1, 2, 4, 8], 90)
  EXPECT_DOUBLE_EQ(Percentile(values, 1.0), 8.0);
  EXPECT_DOUBLE_EQ(Percentile({5.0f}, 0.99), 5.0);
  nlohmann::ordered_json json;
  AddSummary("ttft", values, &json);
  EXPECT_DOUBLE_EQ(json["mean_ttft_ms"], 3.75);
  EXPECT_NEAR(json["std_ttft_ms"].get<double>(), 2.680951, 1e-6);  // numpy.std
  AddSummary("itl", std::vector<float>(), &json);
  EXPECT_TRUE(json["p99_itl_ms"].is_null() && json["mean_itl_ms"].is_null());
}

TEST(Statistics, NineteenOfTwentyIntervalsHoldTheTruth) {
  std::mt19937_64 random(5);
  std::exponential_distribution<float> draw(0.1f);
  int holds_mean = 0, holds_median = 0;
  for (uint64_t run = 0; run < 100; ++run) {
    std::vector<float> values(300);
    for (float& value : values) value = draw(random);
    std::sort(values.begin(), values.end());
    const auto intervals = BootstrapIntervals(values, run);
    holds_mean += intervals["mean"][0] <= 10.0 && intervals["mean"][1] >= 10.0;
    holds_median += intervals["p50"][0] <= 6.9315 && intervals["p50"][1] >= 6.9315;
    ASSERT_LE(intervals["p99"][0], intervals["p99"][1]);
  }
  EXPECT_GE(holds_mean, 88);
  EXPECT_GE(holds_median, 88);
  EXPECT_TRUE(BootstrapIntervals({1.0f}, 1).is_null());
  EXPECT_EQ(BootstrapIntervals({1.0f, 2.0f, 3.0f}, 1), BootstrapIntervals({1.0f, 2.0f, 3.0f}, 1));
}

TEST(Objectives, AreReadLikeVllms) {
  const auto objectives = ParseObjectives({"ttft:200", "itl_p99:80"});
  ASSERT_TRUE(objectives.ok());
  EXPECT_EQ(objectives->ttft_ms, 200.0);
  EXPECT_EQ(objectives->itl_p99_ms, 80.0);
  EXPECT_FALSE(objectives->e2el_ms.has_value());
  for (const char* bad : {"ttft", "ttft:0", "ttft:x", "tftt:5"}) {
    EXPECT_THAT(std::string(ParseObjectives({bad}).status().message()), HasSubstr(bad));
  }
}

class RecorderTest : public testing::Test {
 protected:
  const SteadyTime begin_ = SteadyTime(std::chrono::hours(5));

  SteadyTime At(double ms) const {
    return begin_ + std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double, std::milli>(ms));
  }

  // Due at `due_ms`, sent `lag_ms` later, with a token each `gap_ms` from `first_ms` on.
  Outcome Answered(double due_ms, double lag_ms, double first_ms, double gap_ms, uint32_t tokens) const {
    Outcome o;
    o.scheduled = At(due_ms);
    o.sent = At(due_ms + lag_ms);
    o.first_token = At(first_ms);
    o.last_token = o.ended = At(first_ms + gap_ms * (tokens - 1));
    o.tokens = tokens;
    o.gaps_ms.assign(tokens - 1, static_cast<float>(gap_ms));
    o.prompt_tokens = 3;
    o.tier = v1::TIER_EXACT;
    o.finish = v1::FINISH_REASON_LENGTH;
    return o;
  }

  std::unique_ptr<Recorder> Make(const Objectives& objectives = {}, const std::string& jsonl = "") {
    auto recorder = Recorder::Create(objectives, jsonl, false);
    EXPECT_TRUE(recorder.ok()) << recorder.status();
    (*recorder)->Begin(begin_);
    return *std::move(recorder);
  }
};

TEST_F(RecorderTest, LatencyCountsFromTheScheduledTime) {
  const auto recorder = Make();
  recorder->Add(Answered(100, 40, 200, 10, 3));
  const Record& r = recorder->records()[0];
  EXPECT_DOUBLE_EQ(r.scheduled_s, 0.1);
  EXPECT_FLOAT_EQ(r.lag_ms, 40);
  EXPECT_FLOAT_EQ(r.ttft_ms, 100);
  EXPECT_FLOAT_EQ(r.e2el_ms, 120);
  EXPECT_FLOAT_EQ(r.tpot_ms, 10);
}

TEST_F(RecorderTest, OnlyAnsweredNormalRequestsCountInLatenciesAndGoodput) {
  Objectives objectives;
  objectives.ttft_ms = 150.0;
  objectives.itl_p99_ms = 20.0;
  const auto recorder = Make(objectives);
  recorder->Add(Answered(0, 0, 100, 10, 3));
  recorder->Add(Answered(0, 0, 160, 10, 3));
  recorder->Add(Answered(0, 0, 100, 30, 3));
  Outcome failed = Answered(0, 0, 100, 10, 3);
  failed.code = grpc::StatusCode::UNAVAILABLE;
  recorder->Add(failed);
  Outcome slow = Answered(0, 0, 100, 10, 3);
  slow.kind = RequestKind::kSlowReader;
  recorder->Add(slow);
  std::vector<bool> good;
  for (const Record& r : recorder->records()) good.push_back(r.good);
  EXPECT_THAT(good, ElementsAre(true, false, false, false, false));
  EXPECT_EQ(recorder->gaps()[v1::TIER_EXACT].values().size(), 6u);
}

TEST_F(RecorderTest, TheTimelineShowsAStallWhereItWas) {
  const auto recorder = Make();
  // Every 10 ms; nothing comes between 0.5 and 1 s.
  for (int i = 0; i < 150; ++i) {
    const double due = 10.0 * i + 5.0;
    recorder->Add(Answered(due, 0, due >= 500 && due < 1000 ? 1000 : due + 1, 0, 1));
  }
  const auto& timeline = recorder->intervals();
  ASSERT_EQ(timeline.size(), 15u);
  EXPECT_DOUBLE_EQ(recorder->interval_s(), 0.1);
  for (size_t i = 0; i < timeline.size(); ++i) {
    EXPECT_EQ(timeline[i].sent, 10);
    EXPECT_EQ(timeline[i].completed, i >= 5 && i < 10 ? 0 : i == 10 ? 60 : 10) << i;
  }
  EXPECT_NEAR(timeline[5].ttft.max_ms(), 495, 0.1);
  EXPECT_NEAR(timeline[4].ttft.max_ms(), 1, 0.1);
}

TEST_F(RecorderTest, ALongTimelineGetsCoarserAndLosesNothing) {
  const auto recorder = Make();
  for (int s = 0; s < 10'000; ++s) recorder->Add(Answered(1000.0 * s, 0, 1000.0 * s + 5, 10, 2));
  EXPECT_EQ(recorder->interval_s(), 4.0);
  int64_t sent = 0, tokens = 0, gaps = 0;
  for (const auto& interval : recorder->intervals()) {
    sent += interval.sent;
    tokens += interval.tokens;
    gaps += interval.itl.count();
  }
  EXPECT_EQ(sent, 10'000);
  EXPECT_EQ(tokens, 20'000);
  EXPECT_EQ(gaps, 10'000);
  EXPECT_EQ(recorder->intervals()[1].sent, 4);
}

TEST_F(RecorderTest, AboveTenMillionGapsOnlyTheHistogramIsKept) {
  const auto recorder = Make();
  Outcome long_one = Answered(0, 0, 1, 0.001, 1'000'001);
  for (int i = 0; i < 10; ++i) recorder->Add(long_one);
  EXPECT_TRUE(recorder->gaps_are_exact());
  recorder->Add(long_one);
  EXPECT_FALSE(recorder->gaps_are_exact());
  EXPECT_EQ(recorder->gaps()[v1::TIER_EXACT].values().size(), 0u);
  EXPECT_EQ(recorder->gaps()[v1::TIER_EXACT].histogram().count(), 11'000'000);
}

TEST_F(RecorderTest, WritesALineForEachRequest) {
  const ScratchDirectory scratch;
  const std::string path = scratch.Path("requests.jsonl");
  const auto recorder = Make({}, path);
  Outcome answered = Answered(100, 1, 107.25, 2.5, 3);
  answered.id = 4;
  recorder->Add(answered);
  Outcome refused;
  refused.scheduled = refused.sent = refused.ended = At(5);
  refused.code = grpc::StatusCode::RESOURCE_EXHAUSTED;
  recorder->Add(refused);
  ASSERT_TRUE(recorder->Finish().ok());
  std::ifstream file(path);
  std::string first, second, none;
  std::getline(file, first);
  std::getline(file, second);
  EXPECT_FALSE(std::getline(file, none));
  const auto json = nlohmann::json::parse(first), other = nlohmann::json::parse(second);
  EXPECT_EQ(json["id"], 4);
  EXPECT_EQ(json["ttft_ms"], 7.25);
  EXPECT_EQ(json["itl_ms"], nlohmann::json({2.5, 2.5}));
  EXPECT_EQ(json["tier"], "exact");
  EXPECT_EQ(json["finish"], "length");
  EXPECT_EQ(json["kind"], "normal");
  EXPECT_TRUE(json["density"].is_null());
  EXPECT_EQ(other["code"], "RESOURCE_EXHAUSTED");
  EXPECT_TRUE(other["ttft_ms"].is_null());
  EXPECT_EQ(Recorder::Create({}, "/nowhere/file", false).status().code(), absl::StatusCode::kUnknown);
}

}  // namespace
}  // namespace dejavu
