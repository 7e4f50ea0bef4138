// What is written about calls: escaping, repeats, a pipe that blocks or is closed, trace contexts and spans.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/utf8.h"
#include "nlohmann/json.hpp"
#include "server/observe/logging.h"
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
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

// All bytes, pairs of them, and what is special in Unicode.
std::vector<std::string> HostileTexts() {
  std::vector<std::string> texts = {
      "",     "\xE2\x80\xAE",  "\xC2\x85",    "\xE2\x80\xA8",     "\xED\xA0\x80", "\xF4\x90\x80\x80",
      "\xC3", "a\"b\\c\nd\te", "\x1b[31mred", "\xF0\x9F\x98\x80", "\xC3\xA9"};
  for (int a = 0; a < 256; ++a) {
    texts.push_back({static_cast<char>(a)});
    for (const char b : {'"', '\\', '\n', '\x80', '\xBF', 'u'}) texts.push_back({static_cast<char>(a), b});
  }
  return texts;
}

TEST(JsonString, IsJsonForAnyBytes) {
  for (const std::string& text : HostileTexts()) {
    const std::string json = JsonString(text);
    const nlohmann::json parsed = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(parsed.is_string()) << absl::CHexEscape(text);
    if (IsValidUtf8(text)) {
      EXPECT_EQ(parsed.get<std::string>(), text);
    }
    for (const char c : json) EXPECT_FALSE(static_cast<uint8_t>(c) < 0x20 || c == 0x7F) << absl::CHexEscape(text);
  }
  EXPECT_EQ(JsonString("\xC3(\xC2\x85\xE2\x80\xAE"), "\"\\ufffd(\\u0085\\u202e\"");
  EXPECT_EQ(JsonString("\xC3\xA9"), "\"\xC3\xA9\"");
}

TEST(EscapedForText, LeavesNothingThatEndsALineOrCommandsATerminal) {
  for (const std::string& text : HostileTexts()) {
    const std::string escaped = EscapedForText(text, /*quoted=*/true);
    EXPECT_TRUE(IsValidUtf8(escaped)) << absl::CHexEscape(text);
    for (const char c : escaped) EXPECT_FALSE(static_cast<uint8_t>(c) < 0x20 || c == 0x7F) << absl::CHexEscape(text);
  }
  EXPECT_EQ(EscapedForText("a\nb\x1b[0m\xFF\xC2\x85", false), "a\\nb\\x1b[0m\\xff\\xc2\\x85");
  EXPECT_EQ(EscapedForText("say \"\\\"", true), "say \\\"\\\\\\\"");
  EXPECT_EQ(EscapedForText("say \"\\\"", false), "say \"\\\"");
}

TEST(LogFields, QuotesWhatIsNotPlain) {
  LogFields text(LogFormat::kText);
  text.Text("id", "req-1.a:b").Text("tenant", "a b=c").Text("empty", "").Count("n", -3).Number("ms", 1.23456, 3);
  text.Number("nan", std::nan(""), 3);
  EXPECT_EQ(text.text(), "id=req-1.a:b tenant=\"a b=c\" empty=\"\" n=-3 ms=1.235");
  LogFields json(LogFormat::kJson);
  json.Text("id", "a\n").Count("n", 3).Number("ms", 1.5, 3);
  EXPECT_EQ(json.text(), "\"id\":\"a\\u000a\",\"n\":3,\"ms\":1.500");
}

TEST(RepeatFilter, LetsTheFirstThroughAndCountsTheRestOfTheWindow) {
  RepeatFilter filter;
  const RepeatFilter::Time start = std::chrono::steady_clock::now();
  EXPECT_EQ(filter.next_end(), RepeatFilter::Time::max());
  EXPECT_TRUE(filter.Admit(spdlog::level::warn, "a", start));
  EXPECT_TRUE(filter.Admit(spdlog::level::warn, "b", start + seconds(1)));
  for (int i = 0; i < 7; ++i) EXPECT_FALSE(filter.Admit(spdlog::level::warn, "a", start + seconds(9)));
  EXPECT_EQ(filter.next_end(), start + seconds(10));
  EXPECT_THAT(filter.TakeEnded(start + seconds(9)), IsEmpty());
  const auto ended = filter.TakeEnded(start + seconds(10));
  ASSERT_THAT(ended, SizeIs(1));
  EXPECT_EQ(ended[0].message, "a");
  EXPECT_EQ(ended[0].count, 7);
  EXPECT_TRUE(filter.Admit(spdlog::level::warn, "a", start + seconds(10)));
  EXPECT_FALSE(filter.Admit(spdlog::level::warn, "a", start + seconds(11)));
  EXPECT_THAT(filter.TakeEnded(start + seconds(12)), IsEmpty());  // b's window left nothing out
}

TEST(RepeatFilter, WatchesABoundedNumberOfMessages) {
  RepeatFilter filter;
  const RepeatFilter::Time now = std::chrono::steady_clock::now();
  for (size_t i = 0; i < 2 * RepeatFilter::kMaxMessages; ++i) {
    EXPECT_TRUE(filter.Admit(spdlog::level::warn, absl::StrCat(i), now));
  }
  EXPECT_FALSE(filter.Admit(spdlog::level::warn, "0", now));
  EXPECT_TRUE(filter.Admit(spdlog::level::warn, "later", now + seconds(10)) ||
              !filter.TakeEnded(now + seconds(10)).empty());
}

class LogPipeTest : public testing::Test {
 protected:
  LogPipeTest() {
    signal(SIGPIPE, SIG_IGN);
    EXPECT_EQ(pipe(fds_), 0);
  }
  ~LogPipeTest() override {
    for (const int fd : fds_) {
      if (fd >= 0) close(fd);
    }
  }
  std::unique_ptr<LogPipe> Pipe(size_t max_bytes = 1 << 16) {
    return std::make_unique<LogPipe>(
        fds_[1], max_bytes, [](int64_t n) { return absl::StrCat("lost ", n, "\n"); },
        [] { return LogPipe::Time::max(); });
  }
  std::string ReadSome() {
    std::string text(1 << 20, '\0');
    const ssize_t n = read(fds_[0], text.data(), text.size());
    text.resize(n < 0 ? 0 : static_cast<size_t>(n));
    return text;
  }

  int fds_[2] = {-1, -1};
};

TEST_F(LogPipeTest, WritesLinesInOrder) {
  auto pipe = Pipe();
  const std::string large(10'000, 'x');
  pipe->Write("a\n");
  pipe->Write(large + "\n");
  pipe->Write("b\n");
  EXPECT_TRUE(pipe->Flush(seconds(60)));
  EXPECT_EQ(ReadSome(), "a\n" + large + "\nb\n");
  EXPECT_EQ(pipe->dropped(), 0);
}

TEST_F(LogPipeTest, DropsAndCountsWhatNobodyReadsAndSaysSoLater) {
  auto pipe = Pipe(/*max_bytes=*/10'000);
  const std::string line = std::string(999, 'x') + "\n";
  pipe->Write(line);
  while (pipe->Flush(seconds(2))) pipe->Write(line);  // until the pipe is full
  EXPECT_EQ(pipe->dropped(), 0);
  for (int i = 0; i < 100; ++i) pipe->Write(line);
  EXPECT_EQ(pipe->dropped(), 90);
  std::string text;
  while (text.find("lost") == std::string::npos) text += ReadSome();
  EXPECT_THAT(text, HasSubstr("\nlost 90\n"));
}

TEST_F(LogPipeTest, EndsInTimeWhenNobodyReads) {
  auto pipe = Pipe();
  for (int i = 0; i < 200; ++i) pipe->Write(std::string(1000, 'x'));
  const auto start = std::chrono::steady_clock::now();
  pipe->Close(milliseconds(300));
  EXPECT_LT(std::chrono::steady_clock::now() - start, seconds(5));
  EXPECT_GT(pipe->dropped(), 0);
}

TEST_F(LogPipeTest, SurvivesAReaderThatIsGone) {
  auto pipe = Pipe();
  close(std::exchange(fds_[0], -1));
  for (int i = 0; i < 10; ++i) pipe->Write("line\n");
  EXPECT_TRUE(pipe->Flush(seconds(60)));
  EXPECT_EQ(pipe->dropped(), 10);
}

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
