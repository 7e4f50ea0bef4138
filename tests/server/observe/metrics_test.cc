// The page of an engine whose every counter has moved: what the table declares is on it, as it is declared.
#include "server/observe/metrics.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/fake_engine.h"

namespace dejavu {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::Not;

std::string PageOf(const Engine* engine) {
  const Lifecycle lifecycle;
  Metrics metrics("m", /*edges=*/"", /*per_layer=*/false, /*tenants=*/0, &lifecycle);
  if (engine != nullptr) metrics.SetEngine(engine, 16);
  return metrics.Text();
}

// So that no histogram is left out for want of an observation.
void ObserveAll(EngineMetrics& metrics) {
  for (const MetricFamily* family : metrics.families()) {
    for (size_t i = 0; i < family->series(); ++i) {
      // Ours to write: only the list of rows is read-only.
      if (family->histogram(i) != nullptr) const_cast<Histogram*>(family->histogram(i))->Observe(1.0);
    }
  }
  for (int i = 0; i < kSlos; ++i) metrics.slo_attained[i].Add(1);
}

TEST(Metrics, ShowsEveryRowOfTheTableUnderItsNameWithHelpAndType) {
  FakeEngine engine;
  engine.stats_of_engine.ranks = 2;
  ObserveAll(engine.counted);
  const std::vector<std::string> lines = absl::StrSplit(PageOf(&engine), '\n');
  for (const MetricFamily* family : engine.counted.families()) {
    const std::string name = absl::StrCat("dejavu_", family->name());
    const char* const type = family->histogram(0) != nullptr ? "histogram" : family->counts() ? "counter" : "gauge";
    EXPECT_THAT(lines, Contains(absl::StrCat("# HELP ", name, " ", family->help())).Times(1));
    EXPECT_THAT(lines, Contains(absl::StrCat("# TYPE ", name, " ", type)).Times(1));
    for (size_t i = 0; i < family->series(); ++i) {
      std::string series = absl::StrCat(name, type == std::string("histogram") ? "_count" : "", "{model=\"m\"");
      bool hidden = false;
      for (const auto& [label, value] : family->labels(i)) {
        absl::StrAppend(&series, ",", label, "=\"", value, "\"");
        hidden |= value.empty();
      }
      absl::StrAppend(&series, "} ");
      EXPECT_THAT(lines, Contains(testing::StartsWith(series)).Times(hidden ? 0 : 1)) << series;
    }
  }
}

TEST(Metrics, SaysWithoutAnEngineWhatTheServerAndTheProcessAre) {
  const std::string page = PageOf(nullptr);
  EXPECT_THAT(page, HasSubstr("dejavu_engine_state{model=\"m\",state=\"loading\"} 1\n"));
  EXPECT_THAT(page, HasSubstr("dejavu_client_stall_seconds_count{model=\"m\"} 0\n"));
  EXPECT_THAT(page, HasSubstr("\nprocess_open_fds "));
  EXPECT_THAT(page, Not(HasSubstr("dejavu_requests_running")));
}

TEST(Metrics, CountsCallsByHowTheyEnded) {
  const Lifecycle lifecycle;
  Metrics metrics("m", "client_stall_seconds=1,2", /*per_layer=*/false, /*tenants=*/0, &lifecycle);
  metrics.AddCounter("borrowed_total", "Of another.", [] { return 7; });
  RequestRecord record;
  record.service = "dejavu.v1.GenerationService";
  record.method = "Generate";
  record.finish_reason = "length";
  record.client_stall_seconds = 1.5;
  metrics.OnRequestEnd(record);
  metrics.OnRequestEnd(record);
  const std::string page = metrics.Text();
  EXPECT_THAT(page, HasSubstr("dejavu_requests_total{model=\"m\",method=\"Generate\",code=\"OK\","
                              "finish_reason=\"length\",api=\"dejavu\"} 2\n"));
  EXPECT_THAT(page, HasSubstr("dejavu_client_stall_seconds_bucket{model=\"m\",le=\"2\"} 2\n"));
  EXPECT_THAT(page, HasSubstr("# HELP dejavu_borrowed_total Of another.\n# TYPE dejavu_borrowed_total counter\n"
                              "dejavu_borrowed_total{model=\"m\"} 7\n"));
}

}  // namespace
}  // namespace dejavu
