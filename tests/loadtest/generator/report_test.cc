// What is made of result documents: the knee, the console's words, and the comparison with the server's metrics.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "loadtest/generator/knee.h"
#include "loadtest/generator/report.h"
#include "loadtest/generator/server_metrics.h"

namespace dejavu {
namespace {

Json RunAt(const std::string& label, double rate, double goodput_share, const std::string& loop = "open") {
  return {{"label", label},
          {"model_id", "m"},
          {"loop", loop},
          {"valid", true},
          {"offered_rate", loop == "open" ? Json(rate) : Json()},
          {"max_concurrency", 4},
          {"request_goodput", rate * goodput_share},
          {"goodput_share", goodput_share},
          {"failed", 0},
          {"objectives", {{"itl_p99_ms", 20.0}}},
          {"p99_itl_ms", 12.0}};
}

TEST(Knee, IsTheHighestRateBeforeTheFirstThatFellShort) {
  // Not in order, and one holds by luck beyond the first that did not.
  const std::vector<Json> runs = {RunAt("a", 40, 1), RunAt("a", 10, 1), RunAt("b", 10, 0.5), RunAt("a", 30, 0.98),
                                  RunAt("a", 20, 0.995)};
  const std::vector<Series> series = FindSeries(runs);
  ASSERT_EQ(series.size(), 2u);
  EXPECT_EQ(series[0].runs, (std::vector<size_t>{1, 4, 3, 0}));
  EXPECT_EQ(series[0].knee, 4u);
  ASSERT_EQ(series[0].ended_by.size(), 1u);
  EXPECT_EQ(series[0].ended_by[0], "98 % of the requests met the objectives; 99 % are wanted");
  EXPECT_FALSE(series[1].knee.has_value());
}

TEST(Knee, HoldsOnlyWithoutFailuresAndWithTheTargetBetweenTokensKept) {
  EXPECT_TRUE(FallsShort(RunAt("a", 1, 1)).empty());
  Json failed = RunAt("a", 1, 1);
  failed["failed"] = 1;
  EXPECT_EQ(FallsShort(failed), std::vector<std::string>{"1 request failed"});
  Json slow = RunAt("a", 1, 1);
  slow["p99_itl_ms"] = 20.5;
  EXPECT_EQ(FallsShort(slow), std::vector<std::string>{"p99 between tokens 20.5 ms; 20 ms are wanted"});
  Json invalid = RunAt("a", 1, 1);
  invalid["valid"] = false;
  EXPECT_EQ(FallsShort(invalid), std::vector<std::string>{"the run is invalid"});
  Json without = RunAt("a", 1, 1);
  without["objectives"] = {{"ttft_ms", nullptr}};
  EXPECT_EQ(FallsShort(without), std::vector<std::string>{"no objectives were given"});
}

TEST(Knee, MixesNoLoopsAndIsNoneOfAClosedOne) {
  const std::vector<Series> series = FindSeries({RunAt("a", 1, 1), RunAt("a", 1, 1, "closed")});
  ASSERT_EQ(series.size(), 2u);
  EXPECT_TRUE(series[0].knee.has_value());
  EXPECT_FALSE(series[1].knee.has_value());
}

TEST(Report, SaysFirstThatARunIsInvalidAndWhy) {
  Json run = RunAt("a", 1, 1);
  EXPECT_FALSE(absl::StrContains(ConsoleReport(run), "INVALID"));
  run["valid"] = false;
  run["invalid_because"] = {"p99 lag 3 ms"};
  const std::string report = ConsoleReport(run);
  EXPECT_TRUE(absl::StartsWith(report, "INVALID"));
  EXPECT_TRUE(absl::StrContains(report, "p99 lag 3 ms"));
}

TEST(Report, SaysWhichLoopItWas) {
  EXPECT_TRUE(absl::StrContains(ConsoleReport(RunAt("a", 1, 1)), "open loop"));
  EXPECT_TRUE(absl::StrContains(ConsoleReport(RunAt("a", 1, 1, "closed")), "closed loop, 4 at a time"));
}

// ---- Server and client ----

constexpr char kBefore[] =
    "# HELP dejavu_requests_total x\n"
    "dejavu_requests_total{model=\"m,code=\\\"OK\\\"\",method=\"GenerateStream\",code=\"OK\",finish_reason=\"length\"} "
    "5\n"
    "dejavu_generated_tokens_total{model=\"m\"} 50\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"dense\",le=\"0.01\"} 5\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"dense\",le=\"0.02\"} 5\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"dense\",le=\"+Inf\"} 5\n";
// In between 100 requests, in two tiers: 40 up to 10 ms, 58 up to 20 ms, 2 beyond.
constexpr char kAfter[] =
    "dejavu_requests_total{model=\"m,code=\\\"OK\\\"\",method=\"GenerateStream\",code=\"OK\",finish_reason=\"length\"} "
    "105\n"
    "dejavu_requests_total{model=\"m\",method=\"GetServerInfo\",code=\"OK\",finish_reason=\"\"} 3\n"
    "dejavu_generated_tokens_total{model=\"m\"} 1050\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"dense\",le=\"0.01\"} 35\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"dense\",le=\"0.02\"} 55\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"dense\",le=\"+Inf\"} 57\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"fast\",le=\"0.01\"} 10\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"fast\",le=\"0.02\"} 48\n"
    "dejavu_time_to_first_token_seconds_bucket{model=\"m\",tier=\"fast\",le=\"+Inf\"} 48\n";

Json Check(const Json& run, const std::string& what) {
  const Json report = CompareWithServer(ParseMetrics(kBefore), ParseMetrics(kAfter), run);
  for (const Json& check : report["crosscheck"]) {
    if (check["what"] == what) return check;
  }
  ADD_FAILURE() << what << " is not in " << report.dump();
  return {};
}
Json Seen(int ok, int tokens, double p50_ttft_ms, double p99_ttft_ms = 300) {
  return {{"totals", {{"requests", ok}, {"by_code", {{"OK", ok}}}, {"tokens", tokens}}},
          {"histograms", {{"ttft", Json::array({{p50_ttft_ms, 98}, {p99_ttft_ms, 2}})}}}};
}

TEST(ServerMetrics, CountsOnlyWhatCameInBetween) {
  const Json check = Check(Seen(100, 1000, 15), "requests, OK");
  EXPECT_EQ(check["server"], 100);
  EXPECT_TRUE(check["agrees"]);
  EXPECT_FALSE(Check(Seen(101, 1000, 15), "requests, OK")["agrees"]);
  EXPECT_TRUE(Check(Seen(100, 1000, 15), "output tokens")["agrees"]);
  EXPECT_FALSE(Check(Seen(100, 999, 15), "output tokens")["agrees"]);
}

TEST(ServerMetrics, AgreesWhereThePercentilesLieInTheSameBucketOrTheNext) {
  const std::string p50 = "time to first token, p50, ms";
  EXPECT_EQ(Check(Seen(100, 1000, 15), p50)["server"], Json({10.0, 20.0}));
  for (const double near_ms : {0.1, 9.0, 15.0, 25.0})
    EXPECT_TRUE(Check(Seen(100, 1000, near_ms), p50)["agrees"]) << near_ms;
  // Beyond the last edge.
  const Json p99 = Check(Seen(100, 1000, 15), "time to first token, p99, ms");
  EXPECT_EQ(p99["server"], Json({20.0, nullptr}));
  EXPECT_TRUE(p99["agrees"]);
  EXPECT_FALSE(Check(Seen(100, 1000, 4, 5), "time to first token, p99, ms")["agrees"]);
}

TEST(ServerMetrics, NobodyToAskIsAnErrorThatNamesTheAddress) {
  const absl::Status refused = ScrapeMetrics("http://127.0.0.1:1").status();
  EXPECT_TRUE(absl::StrContains(refused.message(), "http://127.0.0.1:1")) << refused;
  const absl::Status malformed = ScrapeMetrics("127.0.0.1:9464").status();
  EXPECT_EQ(malformed.code(), absl::StatusCode::kInvalidArgument) << malformed;
}

}  // namespace
}  // namespace dejavu
