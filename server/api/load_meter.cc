#include "server/api/load_meter.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace dejavu {
namespace {

// Long enough for a mean over some requests, short enough to follow a server that slows down.
constexpr double kFadeSeconds = 5.0;
constexpr std::chrono::milliseconds kBusyWindow(500);

}  // namespace

LoadMeter::Stay::Stay(LoadMeter* meter, int sequences) : meter_(meter), sequences_(sequences) {
  MutexLock lock(meter_->mutex_);
  meter_->Fade(std::chrono::steady_clock::now());
  meter_->sequences_ += sequences_;
}

void LoadMeter::Stay::End() {
  if (meter_ == nullptr) return;
  MutexLock lock(meter_->mutex_);
  meter_->Fade(std::chrono::steady_clock::now());
  meter_->sequences_ -= sequences_;
  meter_->load_.requests_per_s += 1.0 / kFadeSeconds;
  meter_ = nullptr;
}

void LoadMeter::CountError(SteadyTime now) {
  MutexLock lock(mutex_);
  Fade(now);
  load_.errors_per_s += 1.0 / kFadeSeconds;
}

LoadMeter::Load LoadMeter::Read(SteadyTime now) {
  MutexLock lock(mutex_);
  Fade(now);
  return load_;
}

double LoadMeter::BusyShare(double busy_s, SteadyTime now) {
  MutexLock lock(mutex_);
  if (now - busy_since_ >= kBusyWindow) {
    const double seconds = std::chrono::duration<double>(now - busy_since_).count();
    busy_share_ = std::clamp((busy_s - busy_s_) / seconds, 0.0, 1.0);
    busy_since_ = now;
    busy_s_ = busy_s;
  }
  return busy_share_;
}

// Each mean of a rate x over the past weighs what was t seconds ago by exp(-t / fade).
void LoadMeter::Fade(SteadyTime now) {
  if (now <= at_) return;  // callers read the clock before they get the lock
  const double kept = std::exp(-std::chrono::duration<double>(now - at_).count() / kFadeSeconds);
  at_ = now;
  load_.requests_per_s *= kept;
  load_.errors_per_s *= kept;
  load_.sequences = load_.sequences * kept + sequences_ * (1.0 - kept);
}

}  // namespace dejavu
