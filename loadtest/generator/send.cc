#include "loadtest/generator/send.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "kernels/base/clock.h"

namespace dejavu {
namespace {

using SteadyClock = std::chrono::steady_clock;  // CLOCK_MONOTONIC in libstdc++

constexpr auto kSpin = std::chrono::microseconds(50);  // sleeps end late by about so much
constexpr auto kLookForInterrupt = std::chrono::milliseconds(100);

void Sleep(SteadyTime until) {
  const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(until.time_since_epoch()).count();
  const timespec time{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, nullptr);
}

// False when interrupted.
bool WaitFor(SteadyTime due, const std::atomic<bool>& interrupted) {
  for (;;) {
    if (interrupted.load()) return false;
    const SteadyTime now = SteadyClock::now();
    if (now >= due - kSpin) break;
    Sleep(std::min(due - kSpin, now + kLookForInterrupt));
  }
  while (SteadyClock::now() < due) continue;
  return true;
}

// It runs for microseconds at a time, and everything is measured against its clock.
bool GoFirst() {
  prctl(PR_SET_TIMERSLACK, 1UL);
  const sched_param lowest_of_real_time{sched_get_priority_min(SCHED_FIFO)};
  return pthread_setschedparam(pthread_self(), SCHED_FIFO, &lowest_of_real_time) == 0;
}

class OpenLoop {
 public:
  OpenLoop(const SendPlan& plan, const Workload& workload) : plan_(plan), workload_(workload) {
    if (plan.arrivals) arrivals_.emplace(*plan.arrivals);
  }

  // Seconds since the beginning; nothing after the last one.
  std::optional<double> Next() {
    if (arrivals_) return arrivals_->Next();
    if (plan_.requests > 0 && made_ >= plan_.requests) return std::nullopt;
    if (made_ >= static_cast<int64_t>(workload_.replay().size())) return std::nullopt;
    const double offset_s = workload_.replay()[made_].offset_s / plan_.replay_speed;
    if (plan_.duration_s > 0.0 && offset_s >= plan_.duration_s) return std::nullopt;
    ++made_;
    return offset_s;
  }

 private:
  const SendPlan& plan_;
  const Workload& workload_;
  std::optional<Arrivals> arrivals_;
  int64_t made_ = 0;
};

SendFacts SendOpen(const SendPlan& plan, const Workload& workload, SteadyTime begin,
                   const std::atomic<bool>& interrupted, Client* client) {
  SendFacts facts;
  facts.realtime = GoFirst();
  OpenLoop times(plan, workload);
  int64_t id = 0;
  while (const std::optional<double> offset_s = times.Next()) {
    Client::CallPtr call = client->Prepare(id, workload.Make(plan.phase, id));
    ++id;
    const SteadyTime due = begin + Lasting(*offset_s);
    if (!WaitFor(due, interrupted)) break;
    facts.window_s = *offset_s;
    if (client->in_flight() >= plan.max_in_flight) {
      ++facts.dropped;
      continue;
    }
    client->Send(std::move(call), due);
    ++facts.sent;
  }
  facts.sending_s = SecondsSince(begin);
  if (!interrupted.load()) facts.window_s = std::max(facts.window_s, plan.duration_s);
  return facts;
}

SendFacts SendClosed(const SendPlan& plan, const Workload& workload, SteadyTime begin,
                     const std::atomic<bool>& interrupted, Client* client) {
  SendFacts facts;
  const auto over = [&] {
    return interrupted.load() || (plan.requests > 0 && facts.sent >= plan.requests) ||
           (plan.duration_s > 0.0 && SecondsSince(begin) >= plan.duration_s);
  };
  if (!WaitFor(begin, interrupted)) return facts;
  while (!over()) {
    Client::CallPtr call = client->Prepare(facts.sent, workload.Make(plan.phase, facts.sent));
    while (!client->WaitUntilAtMost(plan.concurrency - 1, SteadyClock::now() + kLookForInterrupt) && !over()) {
    }
    if (over()) break;
    client->Send(std::move(call), std::nullopt);
    ++facts.sent;
  }
  facts.window_s = facts.sending_s = SecondsSince(begin);
  return facts;
}

}  // namespace

SendFacts SendAll(const SendPlan& plan, const Workload& workload, SteadyTime begin,
                  const std::atomic<bool>& interrupted, Client* client) {
  return plan.concurrency > 0 ? SendClosed(plan, workload, begin, interrupted, client)
                              : SendOpen(plan, workload, begin, interrupted, client);
}

}  // namespace dejavu
