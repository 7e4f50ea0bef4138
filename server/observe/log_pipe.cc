#include "server/observe/log_pipe.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <deque>
#include <thread>
#include <utility>

#include "kernels/base/mutex.h"

namespace dejavu {
namespace {

constexpr size_t kAtomicBytes = 4096;  // PIPE_BUF: what poll() promises room for
constexpr int kPollMs = 100;

}  // namespace

// Shared with the thread, which outlives the LogPipe when it hangs.
struct LogPipe::State {
  State(int fd, size_t max_queued_bytes, std::function<std::string(int64_t)> notice, std::function<Time()> tick)
      : fd(fd), max_queued_bytes(max_queued_bytes), notice(std::move(notice)), tick(std::move(tick)) {}

  const int fd;
  const size_t max_queued_bytes;
  const std::function<std::string(int64_t)> notice;
  const std::function<Time()> tick;
  std::atomic<int64_t> dropped{0};
  std::atomic<bool> abandoned{false};  // Close has given up: the thread may end in the middle of a line

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
      ++told;  // a notice would not be read either
      continue;
    }
    const int64_t dropped = s.dropped;
    if (dropped > told && WriteLine(s, s.notice(dropped - told))) told = dropped;
  }
}

// False: the line could not be written, or Close has given up.
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
