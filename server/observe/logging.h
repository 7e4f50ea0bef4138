// Where log lines go: spdlog's default logger and the structured lines of LogEvent, as text or JSON, through one thread
// that alone waits for whoever reads standard error. Nobody else ever waits for it: lines that it cannot take are
// dropped and counted. StartLogging and StopLogging belong to main; the rest may be called by any thread.
#ifndef SERVER_OBSERVE_LOGGING_H_
#define SERVER_OBSERVE_LOGGING_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "kernels/base/mutex.h"
#include "spdlog/common.h"

namespace dejavu {

enum class LogFormat { kText, kJson };

// Opens descriptors 0 to 2 where they are closed, ignores SIGPIPE, and makes spdlog's default logger write to `fd`.
// Once.
void StartLogging(const std::string& level, LogFormat format, int fd = 2);
// Writes what is queued, for a second at most. What is logged later is lost. Before every exit.
void StopLogging();

// Since the start; 0 without StartLogging.
int64_t LogLinesDropped();

// Key and value pairs of a line. Values may hold any bytes.
class LogFields {
 public:
  explicit LogFields(LogFormat format) : format_(format) {}

  LogFields& Text(absl::string_view key, absl::string_view value);
  LogFields& Count(absl::string_view key, int64_t value);
  LogFields& Unsigned(absl::string_view key, uint64_t value);
  LogFields& Number(absl::string_view key, double value, int decimals);  // what is not finite is left out

  const std::string& text() const { return text_; }  // `a=1 b="x y"` or `"a":1,"b":"x y"`

 private:
  void Key(absl::string_view key);

  const LogFormat format_;
  std::string text_;
};

LogFormat ActiveLogFormat();
// A line about an event, "request" or "engine". Nothing without StartLogging or below its level.
bool LogsEvents(spdlog::level::level_enum level);
void LogEvent(spdlog::level::level_enum level, absl::string_view event, const LogFields& fields);

// The parts.

// Text for a line of a log: control characters, what reorders or ends lines, and ill-formed UTF-8 become \n or \xNN;
// with `quoted` backslashes and quotation marks too.
std::string EscapedForText(absl::string_view text, bool quoted);
// With its quotation marks; ill-formed UTF-8 becomes U+FFFD.
std::string JsonString(absl::string_view text);

// Warnings that come again and again: the first goes through, its like within the next ten seconds are counted.
class RepeatFilter {
 public:
  using Time = std::chrono::steady_clock::time_point;
  static constexpr std::chrono::seconds kWindow{10};
  static constexpr size_t kMaxMessages = 256;  // that are watched at a time; others go through

  // False: leave it out.
  bool Admit(spdlog::level::level_enum level, absl::string_view message, Time now);

  struct LeftOut {
    spdlog::level::level_enum level;
    std::string message;
    int64_t count;
  };
  // The windows that have ended and left something out.
  std::vector<LeftOut> TakeEnded(Time now);
  // When the next one ends; Time::max(): there is none.
  Time next_end() const;

 private:
  struct Window {
    spdlog::level::level_enum level;
    Time end;
    int64_t left_out = 0;
  };
  absl::flat_hash_map<std::string, Window> windows_;
};

// A descriptor that may block or be closed at the other end.
class LogPipe {
 public:
  using Time = std::chrono::steady_clock::time_point;

  // `notice` makes the line that says how many were dropped. `tick` is called by the thread whenever the time has come
  // that it returned last; it may call Write.
  LogPipe(int fd, size_t max_queued_bytes, std::function<std::string(int64_t)> notice, std::function<Time()> tick);
  ~LogPipe();  // Close without patience

  // A line with its end. Never waits.
  void Write(std::string line);
  // The thread shall look at `tick` again.
  void Poke();
  // False: what was queued could not be written by then.
  bool Flush(std::chrono::milliseconds patience);
  // Flush, then the end: the thread is left behind if it hangs in a write.
  void Close(std::chrono::milliseconds patience);

  int64_t dropped() const;

 private:
  struct State;
  static void Run(const std::shared_ptr<State>& state);
  static bool WriteLine(State& state, absl::string_view line);

  const std::shared_ptr<State> state_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_LOGGING_H_
