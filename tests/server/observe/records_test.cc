// What is written about calls: trace contexts, records and spans.
#include <string>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/utf8.h"
#include "server/observe/spans.h"
#include "server/observe/trace_exporter.h"
#include "server/rpc/call_ends.h"
#include "server/rpc/request_record.h"
#include "server/rpc/trace_context.h"

namespace dejavu {
namespace {

namespace otlp = opentelemetry::proto::collector::trace::v1;
using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::ElementsAre;
using testing::SizeIs;

constexpr char kParent[] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

TEST(ParseTraceparent, TakesWhatTheStandardAllows) {
  const auto context = ParseTraceparent(kParent);
  ASSERT_TRUE(context.has_value());
  EXPECT_EQ(context->trace_id, "0af7651916cd43dd8448eb211c80319c");
  EXPECT_EQ(context->parent_span_id, "b7ad6b7169203331");
  EXPECT_TRUE(context->sampled);
  std::string text = kParent;
  text.replace(53, 2, "0a");
  EXPECT_FALSE(ParseTraceparent(text)->sampled);
  text.replace(53, 2, "ff");
  EXPECT_TRUE(ParseTraceparent(text)->sampled);
  text.replace(0, 2, "01");  // a later version
  EXPECT_TRUE(ParseTraceparent(text).has_value());
  EXPECT_TRUE(ParseTraceparent(text + "-what-is-not-known-yet").has_value());
  EXPECT_FALSE(ParseTraceparent(text + "what").has_value());
}

TEST(ParseTraceparent, IgnoresEverythingElse) {
  const std::string good = kParent;
  for (size_t n = 0; n < good.size(); ++n) EXPECT_FALSE(ParseTraceparent(good.substr(0, n)).has_value()) << n;
  for (size_t i = 0; i < good.size(); ++i) {
    for (const char wrong : {'g', 'A', '\0', '\n', ' ', '\xFF'}) {
      std::string text = good;
      text[i] = wrong;
      EXPECT_FALSE(ParseTraceparent(text).has_value()) << absl::CHexEscape(text);
    }
  }
  EXPECT_FALSE(ParseTraceparent(good + "-00").has_value());  // version 00 ends there
  EXPECT_FALSE(ParseTraceparent("ff" + good.substr(2)).has_value());
  EXPECT_FALSE(ParseTraceparent("00-" + std::string(32, '0') + "-b7ad6b7169203331-01").has_value());
  EXPECT_FALSE(ParseTraceparent("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01").has_value());
}

TEST(ContextFor, DrawsATraceOnlyForCallsWithoutOne) {
  EXPECT_EQ(ContextFor(std::nullopt, 0.0).trace_id, "");
  const TraceContext drawn = ContextFor(std::nullopt, 1.0);
  EXPECT_THAT(drawn.trace_id, SizeIs(32));
  EXPECT_EQ(drawn.parent_span_id, "");
  EXPECT_TRUE(drawn.sampled);
  EXPECT_NE(ContextFor("nonsense", 1.0).trace_id, drawn.trace_id);
  std::string unsampled = kParent;
  unsampled.back() = '0';
  EXPECT_FALSE(ContextFor(unsampled, 1.0).sampled);
  int sampled = 0;
  for (int i = 0; i < 10'000; ++i) sampled += ContextFor(std::nullopt, 0.25).sampled ? 1 : 0;
  EXPECT_NEAR(sampled, 2500, 250);
}

RequestRecord Generated() {
  RequestRecord record;
  record.service = "dejavu.v1.GenerationService";
  record.method = "GenerateStream";
  record.request_id = "r";
  record.trace = *ParseTraceparent(kParent);
  record.finish_reason = "length";
  record.tier = Tier::kExact;
  record.samples = 1;
  record.prompt_tokens = 5;
  record.generated_tokens = 3;
  record.density = 0.5;
  record.arrival = std::chrono::steady_clock::now() - seconds(1);
  record.queued = record.arrival + milliseconds(1);
  record.scheduled = record.arrival + milliseconds(10);
  record.first_token = record.arrival + milliseconds(100);
  record.finished = record.arrival + milliseconds(300);
  record.ended = record.arrival + milliseconds(301);
  return record;
}

TEST(Records, NameCodesAsGrpcDoes) {
  EXPECT_EQ(CodeName(grpc::StatusCode::OK), "OK");
  EXPECT_EQ(CodeName(grpc::StatusCode::DEADLINE_EXCEEDED), "DEADLINE_EXCEEDED");
  EXPECT_EQ(CodeName(grpc::StatusCode::UNIMPLEMENTED), "UNIMPLEMENTED");
  EXPECT_EQ(CodeName(grpc::StatusCode::UNAVAILABLE), "UNAVAILABLE");
  EXPECT_EQ(CodeName(grpc::StatusCode::UNAUTHENTICATED), "UNAUTHENTICATED");
}

TEST(Records, MeanTheTimeBetweenTokens) {
  RequestRecord record = Generated();
  EXPECT_NEAR(*MeanInterTokenSeconds(record), 0.1, 1e-9);
  record.generated_tokens = 1;
  EXPECT_FALSE(MeanInterTokenSeconds(record).has_value());
}

TEST(Spans, HangUnderTheRequestAndTileItsTime) {
  const RequestRecord record = Generated();
  otlp::ScopeSpans spans;
  const TraceClock clock;
  AppendSpans(record, "m", clock, &spans);
  ASSERT_EQ(spans.spans_size(), SpanCount(record));
  ASSERT_EQ(spans.spans_size(), 4);
  const otlp::Span& request = spans.spans(0);
  EXPECT_EQ(request.name(), "text_completion m");
  EXPECT_EQ(absl::BytesToHexString(request.trace_id()), record.trace.trace_id);
  EXPECT_EQ(absl::BytesToHexString(request.parent_span_id()), record.trace.parent_span_id);
  for (int i = 1; i < 4; ++i) EXPECT_EQ(spans.spans(i).parent_span_id(), request.span_id());
  EXPECT_EQ(spans.spans(1).end_time_unix_nano(), spans.spans(2).start_time_unix_nano());
  EXPECT_EQ(spans.spans(2).end_time_unix_nano(), spans.spans(3).start_time_unix_nano());
  EXPECT_EQ(request.end_time_unix_nano() - request.start_time_unix_nano(), 301'000'000u);
}

TEST(Spans, AreOneForACallWithoutTheEngineAndValidForAnyBytes) {
  RequestRecord record = Generated();
  record.finish_reason = "none";
  record.method = "Tokenize";
  record.tenant = "\xFF\xFE";
  record.code = grpc::StatusCode::INVALID_ARGUMENT;
  otlp::ScopeSpans spans;
  AppendSpans(record, "m", TraceClock(), &spans);
  ASSERT_EQ(spans.spans_size(), 1);
  EXPECT_EQ(spans.spans(0).name(), "Tokenize");
  EXPECT_EQ(spans.spans(0).status().code(), otlp::Status::STATUS_CODE_ERROR);
  for (const auto& attribute : spans.spans(0).attributes()) {
    EXPECT_TRUE(IsValidUtf8(attribute.value().string_value())) << attribute.key();
  }
}

// Nobody listens there: port 9 of this machine.
TEST(TraceExporter, DropsAndCountsWithoutACollector) {
  TraceExporterOptions options;
  options.endpoint = "127.0.0.1:9";
  options.max_queue = 40;
  options.batch_delay = seconds(60);  // nothing leaves before Stop
  TraceExporter exporter(options);
  RequestRecord unsampled = Generated();
  unsampled.trace.sampled = false;
  exporter.OnRequestEnd(unsampled);
  for (int i = 0; i < 15; ++i) exporter.OnRequestEnd(Generated());
  EXPECT_EQ(exporter.dropped(), 20);
  exporter.Stop();
  EXPECT_EQ(exporter.dropped(), 60);
  EXPECT_EQ(exporter.exported(), 0);
}

class Heard final : public RequestObserver {
 public:
  void OnRequestEnd(const RequestRecord& record) override { ids.push_back(record.request_id); }
  std::vector<std::string> ids;
};

TEST(CallEnds, ForgetsWhatComesAfterItsClose) {
  Heard heard;
  Writer writer;
  CallEnds ends(&writer, 0.0);
  ends.Add(&heard);
  RequestRecord record;
  record.request_id = "a";
  ends.Expect();
  ends.ReportLate(record);
  ends.Expect();
  const auto start = std::chrono::steady_clock::now();
  ends.Close(start + milliseconds(20));
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(20));
  record.request_id = "b";
  ends.ReportLate(record);
  EXPECT_FALSE(ends.Post(nullptr));
  EXPECT_THAT(heard.ids, ElementsAre("a"));
}

}  // namespace
}  // namespace dejavu
