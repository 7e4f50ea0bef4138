// LoadMeter: how much clients have asked of the server lately: requests and errors per second, and how many sequences
// were in it, running or waiting, on average. All are means that fade with the same time constant, so that their
// quotients are exact: requests per second over mean sequences is one over the mean time that a sequence stays
// (Little's law), which is what weighted_round_robin makes of a report. Any thread.
#ifndef SERVER_API_LOAD_METER_H_
#define SERVER_API_LOAD_METER_H_

#include <utility>

#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"

namespace dejavu {

class LoadMeter {
 public:
  // So many sequences are in the engine, as long as it lives.
  class Stay {
   public:
    Stay() = default;
    Stay(LoadMeter* meter, int sequences);
    ~Stay() { End(); }
    Stay(Stay&& other) noexcept : meter_(std::exchange(other.meter_, nullptr)), sequences_(other.sequences_) {}
    Stay& operator=(Stay&& other) noexcept {
      End();
      meter_ = std::exchange(other.meter_, nullptr);
      sequences_ = other.sequences_;
      return *this;
    }

   private:
    void End();

    LoadMeter* meter_ = nullptr;
    int sequences_ = 0;
  };

  // A request was answered by an error that is the server's: it has no room, or it fails.
  void CountError(SteadyTime now);

  struct Load {
    double requests_per_s = 0.0;  // that have left the engine
    double errors_per_s = 0.0;
    double sequences = 0.0;
  };
  Load Read(SteadyTime now);

  // The share of the time that was spent in `busy_s`, a number of seconds that only grows, at late readings.
  double BusyShare(double busy_s, SteadyTime now);

 private:
  void Fade(SteadyTime now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  SteadyTime at_ ABSL_GUARDED_BY(mutex_);  // of the numbers in load_
  Load load_ ABSL_GUARDED_BY(mutex_);
  int sequences_ ABSL_GUARDED_BY(mutex_) = 0;  // now
  SteadyTime busy_since_ ABSL_GUARDED_BY(mutex_);
  double busy_s_ ABSL_GUARDED_BY(mutex_) = 0.0;  // then
  double busy_share_ ABSL_GUARDED_BY(mutex_) = 0.0;
};

}  // namespace dejavu

#endif  // SERVER_API_LOAD_METER_H_
