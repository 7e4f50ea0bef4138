#include "server/observe/logging.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <ctime>
#include <deque>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/utf8.h"
#include "spdlog/sinks/sink.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr size_t kMaxQueuedBytes = 1 << 20;
constexpr std::chrono::milliseconds kLastLines(1000);
constexpr std::chrono::milliseconds kCriticalLine(200);
constexpr size_t kAtomicBytes = 4096;  // PIPE_BUF: what poll() promises room for
constexpr int kPollMs = 100;

uint32_t CodePoint(absl::string_view character) {
  constexpr uint8_t kLeadBits[] = {0, 0x7F, 0x1F, 0x0F, 0x07};
  uint32_t code = static_cast<uint8_t>(character[0]) & kLeadBits[character.size()];
  for (size_t i = 1; i < character.size(); ++i) code = code << 6 | (static_cast<uint8_t>(character[i]) & 0x3F);
  return code;
}

// Controls, line and paragraph separators, and what changes the direction of the text around it.
bool IsUnsafe(uint32_t code) {
  return code < 0x20 || (code >= 0x7F && code < 0xA0) || code == 0x061C || code == 0x200E || code == 0x200F ||
         (code >= 0x2028 && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069) || code == 0xFEFF;
}

bool IsPlain(absl::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           absl::string_view("._:/[]+-").find(c) != absl::string_view::npos;
  });
}

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
      const RepeatFilter::Time due = filter_.next_end();
      const std::vector<RepeatFilter::LeftOut> ended = filter_.TakeEnded(now);
      WriteLeftOut(ended);
      if (!filter_.Admit(message.level, text, now)) return;
      if (due == RepeatFilter::Time::max()) pipe_.Poke();
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
          absl::StrCat(left.message, " (", left.count, " more times within ", RepeatFilter::kWindow.count(), " s)")));
    }
  }

  RepeatFilter::Time Tick() {
    MutexLock lock(mutex_);
    WriteLeftOut(filter_.TakeEnded(std::chrono::steady_clock::now()));
    return filter_.next_end();
  }

  const LogFormat format_;
  Mutex mutex_;
  RepeatFilter filter_ ABSL_GUARDED_BY(mutex_);
  LogPipe pipe_;  // the last: its thread calls this object
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

void LogEvent(spdlog::level::level_enum level, absl::string_view event, const LogFields& fields) {
  if (LogsEvents(level)) ActiveSink()->Event(level, event, fields);
}

LogFields& LogFields::Text(absl::string_view key, absl::string_view value) {
  Key(key);
  if (format_ == LogFormat::kJson) {
    text_ += JsonString(value);
  } else if (IsPlain(value)) {
    absl::StrAppend(&text_, value);
  } else {
    absl::StrAppend(&text_, "\"", EscapedForText(value, /*quoted=*/true), "\"");
  }
  return *this;
}

LogFields& LogFields::Count(absl::string_view key, int64_t value) {
  Key(key);
  absl::StrAppend(&text_, value);
  return *this;
}

LogFields& LogFields::Unsigned(absl::string_view key, uint64_t value) {
  Key(key);
  absl::StrAppend(&text_, value);
  return *this;
}

LogFields& LogFields::Number(absl::string_view key, double value, int decimals) {
  if (!std::isfinite(value)) return *this;
  Key(key);
  absl::StrAppendFormat(&text_, "%.*f", decimals, value);
  return *this;
}

void LogFields::Key(absl::string_view key) {
  if (format_ == LogFormat::kJson) {
    absl::StrAppend(&text_, text_.empty() ? "\"" : ",\"", key, "\":");
  } else {
    absl::StrAppend(&text_, text_.empty() ? "" : " ", key, "=");
  }
}

std::string EscapedForText(absl::string_view text, bool quoted) {
  std::string escaped;
  escaped.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = FirstUtf8Step(text);
    const absl::string_view character = text.substr(0, step.length);
    text.remove_prefix(step.length);
    const bool unsafe = step.kind != Utf8Kind::kWhole || IsUnsafe(CodePoint(character));
    if (character == "\n") {
      escaped += "\\n";
    } else if (unsafe) {
      for (const char byte : character) absl::StrAppendFormat(&escaped, "\\x%02x", static_cast<uint8_t>(byte));
    } else {
      if (quoted && (character == "\"" || character == "\\")) escaped += '\\';
      absl::StrAppend(&escaped, character);
    }
  }
  return escaped;
}

std::string JsonString(absl::string_view text) {
  std::string json = "\"";
  json.reserve(text.size() + 2);
  while (!text.empty()) {
    const Utf8Step step = FirstUtf8Step(text);
    const absl::string_view character = text.substr(0, step.length);
    text.remove_prefix(step.length);
    if (step.kind != Utf8Kind::kWhole) {
      json += "\\ufffd";
    } else if (character == "\"" || character == "\\") {
      absl::StrAppend(&json, "\\", character);
    } else if (const uint32_t code = CodePoint(character); IsUnsafe(code)) {  // none is above U+FFFF
      absl::StrAppendFormat(&json, "\\u%04x", code);
    } else {
      absl::StrAppend(&json, character);
    }
  }
  json += '"';
  return json;
}

bool RepeatFilter::Admit(spdlog::level::level_enum level, absl::string_view message, Time now) {
  const auto found = windows_.find(message);
  if (found != windows_.end() && now < found->second.end) {
    ++found->second.left_out;
    return false;
  }
  if (found != windows_.end()) {
    found->second = {level, now + kWindow, 0};
  } else if (windows_.size() < kMaxMessages) {
    windows_.emplace(std::string(message), Window{level, now + kWindow, 0});
  }
  return true;
}

std::vector<RepeatFilter::LeftOut> RepeatFilter::TakeEnded(Time now) {
  std::vector<LeftOut> ended;
  for (auto it = windows_.begin(); it != windows_.end();) {
    const auto window = it++;
    if (now < window->second.end) continue;
    if (window->second.left_out > 0) ended.push_back({window->second.level, window->first, window->second.left_out});
    windows_.erase(window);
  }
  return ended;
}

RepeatFilter::Time RepeatFilter::next_end() const {
  Time next = Time::max();
  for (const auto& [message, window] : windows_) next = std::min(next, window.end);
  return next;
}

// Shared with the thread, which outlives the LogPipe when it hangs.
struct LogPipe::State {
  State(int fd, size_t max_queued_bytes, std::function<std::string(int64_t)> notice, std::function<Time()> tick)
      : fd(fd), max_queued_bytes(max_queued_bytes), notice(std::move(notice)), tick(std::move(tick)) {}

  const int fd;
  const size_t max_queued_bytes;
  const std::function<std::string(int64_t)> notice;
  const std::function<Time()> tick;
  std::atomic<int64_t> dropped{0};
  std::atomic<bool> abandoned{false};  // nobody waits for the thread any more

  Mutex mutex;
  CondVar work, written;
  std::deque<std::string> queue ABSL_GUARDED_BY(mutex);
  size_t queued_bytes ABSL_GUARDED_BY(mutex) = 0;
  bool writing ABSL_GUARDED_BY(mutex) = false;
  bool poked ABSL_GUARDED_BY(mutex) = true;
  bool closed ABSL_GUARDED_BY(mutex) = false;
  bool ended ABSL_GUARDED_BY(mutex) = false;
};

LogPipe::LogPipe(int fd, size_t max_queued_bytes, std::function<std::string(int64_t)> notice,
                 std::function<Time()> tick)
    : state_(std::make_shared<State>(fd, max_queued_bytes, std::move(notice), std::move(tick))) {
  // Signals are for the main thread.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread([state = state_] { Run(state); }).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

LogPipe::~LogPipe() { Close(std::chrono::milliseconds(0)); }

void LogPipe::Write(std::string line) {
  MutexLock lock(state_->mutex);
  if (state_->closed) return;
  if (state_->queued_bytes + line.size() > state_->max_queued_bytes) {
    ++state_->dropped;
    return;
  }
  state_->queued_bytes += line.size();
  state_->queue.push_back(std::move(line));
  state_->work.NotifyOne();
}

void LogPipe::Poke() {
  MutexLock lock(state_->mutex);
  state_->poked = true;
  state_->work.NotifyOne();
}

bool LogPipe::Flush(std::chrono::milliseconds patience) {
  const Time deadline = std::chrono::steady_clock::now() + patience;
  MutexLock lock(state_->mutex);
  while (!state_->queue.empty() || state_->writing) {
    if (!state_->written.WaitUntil(state_->mutex, deadline)) return state_->queue.empty() && !state_->writing;
  }
  return true;
}

void LogPipe::Close(std::chrono::milliseconds patience) {
  Flush(patience);
  state_->abandoned = true;
  const Time deadline = std::chrono::steady_clock::now() + patience;
  MutexLock lock(state_->mutex);
  state_->closed = true;
  state_->work.NotifyOne();
  while (!state_->ended && state_->written.WaitUntil(state_->mutex, deadline)) {
  }
}

int64_t LogPipe::dropped() const { return state_->dropped; }

void LogPipe::Run(const std::shared_ptr<State>& state) {
  State& s = *state;
  int64_t told = 0;
  Time due = Time::max();
  while (true) {
    std::string line;
    bool tick = false;
    {
      MutexLock lock(s.mutex);
      s.writing = false;
      if (s.queue.empty()) s.written.NotifyAll();
      while (s.queue.empty() && !s.closed && !s.poked && std::chrono::steady_clock::now() < due) {
        if (due == Time::max()) {
          s.work.Wait(s.mutex);
        } else {
          s.work.WaitUntil(s.mutex, due);
        }
      }
      if (s.closed) {
        s.dropped += static_cast<int64_t>(s.queue.size());
        s.queue.clear();
        s.ended = true;
        s.written.NotifyAll();
        return;
      }
      tick = s.poked || std::chrono::steady_clock::now() >= due;
      s.poked = false;
      if (!s.queue.empty()) {
        s.writing = true;
        line = std::move(s.queue.front());
        s.queue.pop_front();
        s.queued_bytes -= line.size();
      }
    }
    if (tick) due = s.tick();
    if (line.empty()) continue;
    if (!WriteLine(s, line)) {
      ++s.dropped;
      ++told;  // nobody is there to be told
      continue;
    }
    const int64_t dropped = s.dropped;
    if (dropped > told && WriteLine(s, s.notice(dropped - told))) told = dropped;
  }
}

// False: it could not be written, or nobody waits for it any more.
bool LogPipe::WriteLine(State& state, absl::string_view line) {
  while (!line.empty()) {
    pollfd ready{state.fd, POLLOUT, 0};
    const int found = poll(&ready, 1, kPollMs);
    if (found <= 0) {
      if (state.abandoned || (found < 0 && errno != EINTR)) return false;
      continue;
    }
    const ssize_t written = write(state.fd, line.data(), std::min(line.size(), kAtomicBytes));
    if (written < 0) {
      if (errno != EINTR && errno != EAGAIN) return false;
      if (state.abandoned) return false;
      continue;
    }
    line.remove_prefix(static_cast<size_t>(written));
  }
  return true;
}

}  // namespace dejavu
