#include "server/observe/logging.h"

#include <fcntl.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/mutex.h"
#include "server/observe/log_pipe.h"
#include "server/observe/log_text.h"
#include "server/observe/repeat_filter.h"
#include "spdlog/sinks/sink.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr size_t kMaxQueuedBytes = 1 << 20;
constexpr std::chrono::milliseconds kLastLines(1000);
constexpr std::chrono::milliseconds kCriticalLine(200);
constexpr std::chrono::seconds kWarningWindow(10), kRefusalWindow(1);

// 2026-11-21T19:41:49.123+00:00
std::string TimeText(std::chrono::system_clock::time_point time) {
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count();
  const std::time_t seconds = ms / 1000;
  std::tm local;
  localtime_r(&seconds, &local);
  const long offset = local.tm_gmtoff / 60, away = std::abs(offset);
  return absl::StrFormat("%04d-%02d-%02dT%02d:%02d:%02d.%03d%c%02d:%02d", local.tm_year + 1900, local.tm_mon + 1,
                         local.tm_mday, local.tm_hour, local.tm_min, local.tm_sec, ms % 1000, offset < 0 ? '-' : '+',
                         away / 60, away % 60);
}

absl::string_view LevelName(spdlog::level::level_enum level) {
  const auto name = spdlog::level::to_string_view(level);
  return absl::string_view(name.data(), name.size());
}

class LogSink final : public spdlog::sinks::sink {
 public:
  LogSink(LogFormat format, int fd)
      : format_(format),
        pipe_(
            fd, kMaxQueuedBytes, [this](int64_t n) { return Dropped(n); }, [this] { return Tick(); }) {}

  LogFormat format() const { return format_; }
  LogPipe& pipe() { return pipe_; }

  void log(const spdlog::details::log_msg& message) override {
    const absl::string_view text(message.payload.data(), message.payload.size());
    if (message.level == spdlog::level::warn || message.level == spdlog::level::err) {
      const auto now = std::chrono::steady_clock::now();
      MutexLock lock(mutex_);
      const RepeatFilter::Time due = NextEnd();
      WriteLeftOut(warnings_.TakeEnded(now));
      const bool admitted = warnings_.Admit(message.level, text, now);
      if (NextEnd() < due) pipe_.Poke();
      if (!admitted) return;
    }
    pipe_.Write(MessageLine(message.time, message.level, text));
    if (message.level == spdlog::level::critical) pipe_.Flush(kCriticalLine);
  }
  void Event(spdlog::level::level_enum level, absl::string_view event, const LogFields& fields) {
    const std::string time = TimeText(std::chrono::system_clock::now());
    if (format_ == LogFormat::kText) {
      pipe_.Write(absl::StrCat(time, " ", LevelName(level), " ", event, " ", fields.text(), "\n"));
    } else {
      pipe_.Write(absl::StrCat("{\"time\":\"", time, "\",\"level\":\"", LevelName(level), "\",\"event\":\"", event,
                               "\",", fields.text(), "}\n"));
    }
  }
  bool AdmitsRefusal(spdlog::level::level_enum level, absl::string_view code, int most_per_s) {
    const auto now = std::chrono::steady_clock::now();
    MutexLock lock(mutex_);
    const RepeatFilter::Time due = NextEnd();
    WriteRefusalsLeftOut(refusals_.TakeEnded(now));
    const bool admitted = refusals_.Admit(level, code, now, most_per_s);
    if (NextEnd() < due) pipe_.Poke();
    return admitted;
  }
  void flush() override {}
  void set_pattern(const std::string&) override {}
  void set_formatter(std::unique_ptr<spdlog::formatter>) override {}

 private:
  std::string MessageLine(std::chrono::system_clock::time_point time, spdlog::level::level_enum level,
                          absl::string_view text) const {
    if (format_ == LogFormat::kText) {
      return absl::StrCat(TimeText(time), " ", LevelName(level), " ", EscapedForText(text, /*quoted=*/false), "\n");
    }
    return absl::StrCat("{\"time\":\"", TimeText(time), "\",\"level\":\"", LevelName(level),
                        "\",\"message\":", JsonString(text), "}\n");
  }

  std::string Dropped(int64_t lines) const {
    return MessageLine(std::chrono::system_clock::now(), spdlog::level::warn,
                       absl::StrCat(lines, " log lines were dropped: nobody read them in time"));
  }

  void WriteLeftOut(const std::vector<RepeatFilter::LeftOut>& ended) {
    for (const RepeatFilter::LeftOut& left : ended) {
      pipe_.Write(MessageLine(
          std::chrono::system_clock::now(), left.level,
          absl::StrCat(left.message, " (", left.count, " more times within ", kWarningWindow.count(), " s)")));
    }
  }
  void WriteRefusalsLeftOut(const std::vector<RepeatFilter::LeftOut>& ended) {
    for (const RepeatFilter::LeftOut& left : ended) {
      LogFields fields(format_);
      fields.Text("code", left.message).Count("count", left.count).Count("within_s", kRefusalWindow.count());
      Event(left.level, "refusals_left_out", fields);
    }
  }

  RepeatFilter::Time Tick() {
    const auto now = std::chrono::steady_clock::now();
    MutexLock lock(mutex_);
    WriteLeftOut(warnings_.TakeEnded(now));
    WriteRefusalsLeftOut(refusals_.TakeEnded(now));
    return NextEnd();
  }
  RepeatFilter::Time NextEnd() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return std::min(warnings_.next_end(), refusals_.next_end());
  }

  const LogFormat format_;
  Mutex mutex_;
  RepeatFilter warnings_ ABSL_GUARDED_BY(mutex_){kWarningWindow};
  RepeatFilter refusals_ ABSL_GUARDED_BY(mutex_){kRefusalWindow};  // by code
  LogPipe pipe_;                                                   // the last: its thread calls this object
};

// As spdlog's default logger, one for the process. Never destroyed: a thread that hangs in a write may be left behind.
std::atomic<std::shared_ptr<LogSink>*> active_sink{nullptr};

LogSink* ActiveSink() {
  const auto* sink = active_sink.load(std::memory_order_acquire);
  return sink == nullptr ? nullptr : sink->get();
}

}  // namespace

void StartLogging(const std::string& level, LogFormat format, int fd) {
  CHECK(ActiveSink() == nullptr) << "logging starts once";
  // A file or socket that took the number of a closed standard error would get our lines.
  for (int standard = 0; standard <= 2; ++standard) {
    if (fcntl(standard, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) break;
  }
  signal(SIGPIPE, SIG_IGN);
  auto* sink = new std::shared_ptr<LogSink>(std::make_shared<LogSink>(format, fd));
  spdlog::set_default_logger(std::make_shared<spdlog::logger>("dejavud", *sink));
  spdlog::set_level(spdlog::level::from_str(level));
  active_sink.store(sink, std::memory_order_release);
}

void StopLogging() {
  if (LogSink* sink = ActiveSink()) sink->pipe().Close(kLastLines);
}

int64_t LogLinesDropped() {
  LogSink* sink = ActiveSink();
  return sink == nullptr ? 0 : sink->pipe().dropped();
}

LogFormat ActiveLogFormat() {
  LogSink* sink = ActiveSink();
  return sink == nullptr ? LogFormat::kText : sink->format();
}

bool LogsEvents(spdlog::level::level_enum level) { return ActiveSink() != nullptr && spdlog::should_log(level); }

bool LogsRefusal(spdlog::level::level_enum level, absl::string_view code, int most_per_s) {
  if (!LogsEvents(level)) return false;
  return most_per_s == 0 || ActiveSink()->AdmitsRefusal(level, code, most_per_s);
}

void LogEvent(spdlog::level::level_enum level, absl::string_view event, const LogFields& fields) {
  if (LogsEvents(level)) ActiveSink()->Event(level, event, fields);
}

}  // namespace dejavu
