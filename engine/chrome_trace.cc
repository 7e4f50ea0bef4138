#include "engine/chrome_trace.h"

#include <chrono>
#include <cstdint>
#include <set>

#include "absl/strings/str_format.h"

namespace dejavu {
namespace {

constexpr int kProcess = 1, kStepThread = 1;
// Each sequence has a thread: gaps of one do not overlap.
uint64_t ThreadOf(const SlowToken& token) { return kStepThread + token.sequence; }

// Complete events. Parts lie within their step, in the order in which they come.
class Events {
 public:
  explicit Events(SteadyTime origin) : origin_(origin) {}

  void Name(uint64_t thread, const std::string& name) {
    Comma();
    absl::StrAppendFormat(&text_, R"({"name":"thread_name","ph":"M","pid":%d,"tid":%d,"args":{"name":"%s"}})", kProcess,
                          thread, name);
  }

  void Step(const StepRecord& s) {
    const double start = MicrosOf(s.start);
    Add("step", kStepThread, start, s.total_ms, StepArguments(s));
    double at = start;
    const auto part = [&](const char* name, float ms) {
      if (ms > 0.0f) Add(name, kStepThread, at, ms, "");
      at += 1e3 * ms;
    };
    part("plan", s.plan_ms);
    part("shadow", s.shadow_ms);
    part("forward", s.forward_ms);
    part("handout", s.handout_ms);
  }

  void Token(const SlowToken& t) {
    Add("token gap", ThreadOf(t), MicrosOf(t.token) - 1e3 * t.gap_ms, t.gap_ms,
        absl::StrFormat(R"("sequence":%d,"generated_tokens":%d,"gap_ms":%.4f,"steps_in_gap":%d,%s)", t.sequence,
                        t.generated_tokens, t.gap_ms, t.steps, StepArguments(t.step)));
  }

  std::string Finish() { return "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n" + text_ + "\n]}\n"; }

 private:
  double MicrosOf(SteadyTime time) const { return std::chrono::duration<double, std::micro>(time - origin_).count(); }

  static const char* PhaseOf(const StepRecord& s) {
    if (s.prefill_rows == 0) return "decode";
    return s.decode_rows == 0 ? "prefill" : "mixed";
  }

  static std::string StepArguments(const StepRecord& s) {
    return absl::StrFormat(
        R"("step":%d,"phase":"%s","rows":%d,"decode_rows":%d,"prefill_rows":%d,"shadow_rows":%d,"total_ms":%.4f,)"
        R"("plan_ms":%.4f,"shadow_ms":%.4f,"forward_ms":%.4f,"handout_ms":%.4f,"weight_bytes":%d)",
        s.step, PhaseOf(s), s.decode_rows + s.prefill_rows, s.decode_rows, s.prefill_rows, s.shadow_rows, s.total_ms,
        s.plan_ms, s.shadow_ms, s.forward_ms, s.handout_ms, s.weight_bytes);
  }

  void Comma() {
    if (!text_.empty()) text_ += ",\n";
  }

  void Add(const char* name, uint64_t thread, double micros, double ms, const std::string& arguments) {
    Comma();
    absl::StrAppendFormat(&text_, R"({"name":"%s","ph":"X","pid":%d,"tid":%d,"ts":%.3f,"dur":%.3f,"args":{%s}})", name,
                          kProcess, thread, micros, 1e3 * ms, arguments);
  }

  const SteadyTime origin_;
  std::string text_;
};

}  // namespace

std::string ChromeTrace(const std::vector<StepRecord>& steps, const std::vector<SlowToken>& tokens, SteadyTime origin) {
  Events events(origin);
  events.Name(kStepThread, "steps");
  std::set<uint64_t> sequences;
  for (const SlowToken& token : tokens) {
    if (sequences.insert(token.sequence).second) {
      events.Name(ThreadOf(token), absl::StrFormat("slow tokens of sequence %d", token.sequence));
    }
  }
  for (const StepRecord& step : steps) events.Step(step);
  for (const SlowToken& token : tokens) events.Token(token);
  return events.Finish();
}

}  // namespace dejavu
