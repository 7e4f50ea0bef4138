// Recorder: what became of the requests of a run, in a few tens of bytes for each: exact latencies of every request,
// gaps between tokens of every stream up to ten millions (then histograms), counts over time, and the line of JSON that
// goes to disk at a request's end. Any number of threads; reading (records(), ...) only after the last Add.
#ifndef LOADTEST_GENERATOR_RECORDER_H_
#define LOADTEST_GENERATOR_RECORDER_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dejavu/v1/generation.pb.h"
#include "grpcpp/support/status_code_enum.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "loadtest/generator/histogram.h"
#include "loadtest/generator/workload.h"

namespace dejavu {

// One call, at its end. In a closed loop `scheduled` is `sent`.
struct Outcome {
  int64_t id = 0;
  RequestKind kind = RequestKind::kNormal;
  SteadyTime scheduled, sent, first_token, last_token, ended;  // first and last: only with tokens
  uint32_t tokens = 0;
  std::vector<float> gaps_ms;  // tokens - 1 of them; tokens that came in one message are 0 apart
  uint32_t prompt_tokens = 0;  // 0: the server has not said
  v1::Tier tier = v1::TIER_UNSPECIFIED;
  v1::FinishReason finish = v1::FINISH_REASON_UNSPECIFIED;
  float density = -1.0f;  // of MLP weight rows; below 0: not known
  grpc::StatusCode code = grpc::StatusCode::OK;
};

// Wanted of every request, in ms; nothing where there is no such target.
struct Objectives {
  std::optional<double> ttft_ms, tpot_ms, itl_p99_ms, e2el_ms;
};
// From "ttft:200", "tpot:50", "itl_p99:80", "e2el:5000".
absl::StatusOr<Objectives> ParseObjectives(const std::vector<std::string>& entries);

inline constexpr int kTiers = v1::Tier_ARRAYSIZE;

// Times count from the scheduled one. NaN: there is none.
struct Record {
  double scheduled_s;  // since the beginning of the run
  float lag_ms, ttft_ms, e2el_ms, tpot_ms;
  float density;
  uint32_t prompt_tokens, tokens;
  uint8_t tier, code, finish;
  RequestKind kind;
  bool good;  // normal, answered, and within every objective
};

// The gaps between the tokens of many streams.
class Gaps {
 public:
  void Add(float ms, bool keep) {
    if (keep) values_.push_back(ms);
    histogram_.Add(ms);
  }
  void Forget() { values_ = {}; }  // the kept ones; the histogram stays
  const std::deque<float>& values() const { return values_; }
  const TimeHistogram& histogram() const { return histogram_; }

 private:
  std::deque<float> values_;
  TimeHistogram histogram_;
};

class Recorder {
 public:
  static constexpr int64_t kMaxExactGaps = 10'000'000;

  struct Interval {
    int64_t sent = 0, completed = 0, failed = 0, tokens = 0;  // sent and tokens of all kinds, the others of normal ones
    int64_t ended = 0;
    TimeHistogram ttft;  // of the requests scheduled in it
    TimeHistogram itl;   // of the tokens that came in it
  };

  struct Progress {
    int64_t ended = 0, completed = 0, failed = 0, tokens = 0;
    TimeHistogram ttft;  // since the last call of progress()
  };

  // `jsonl` gets a line for each request; empty: none.
  static absl::StatusOr<std::unique_ptr<Recorder>> Create(const Objectives& objectives, const std::string& jsonl,
                                                          bool append);
  ~Recorder();

  // Before the first Add.
  void Begin(SteadyTime start) { start_ = start; }
  void Add(const Outcome& outcome) ABSL_LOCKS_EXCLUDED(mutex_);
  Progress progress() ABSL_LOCKS_EXCLUDED(mutex_);

  // Closes the file; UNKNOWN where not everything could be written.
  absl::Status Finish();

  // After the last Add.
  SteadyTime start() const { return start_; }
  SteadyTime last_end() const { return last_end_; }
  const std::vector<Record>& records() const { return records_; }
  const std::array<Gaps, kTiers>& gaps() const { return gaps_; }  // by tier, of normal requests that were answered
  bool gaps_are_exact() const { return gaps_are_exact_; }
  const std::vector<Interval>& intervals() const { return intervals_; }
  double interval_s() const { return interval_s_; }

 private:
  explicit Recorder(const Objectives& objectives) : objectives_(objectives) {}

  Record Summarise(const Outcome& outcome) const;
  std::string Line(const Outcome& outcome, const Record& record) const;
  void AddToTimeline(const Outcome& outcome, const Record& record) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Interval& At(double s) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  double SinceStart(SteadyTime time) const { return Seconds(start_, time); }

  const Objectives objectives_;
  SteadyTime start_;
  Mutex mutex_;
  // Written under mutex_, read after the last Add.
  SteadyTime last_end_;
  std::vector<Record> records_;
  std::array<Gaps, kTiers> gaps_;
  int64_t gap_count_ = 0;
  bool gaps_are_exact_ = true;
  std::vector<Interval> intervals_;
  double interval_s_ = 0.1;
  Progress progress_;

  Mutex file_mutex_;
  std::string path_;
  std::FILE* file_ = nullptr;
  bool write_failed_ = false;
};

// "length", "eos", ...; "none" without one. "dense", ...; "default" where the server has not said.
std::string FinishInReport(v1::FinishReason reason);
std::string TierInReport(v1::Tier tier);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_RECORDER_H_
