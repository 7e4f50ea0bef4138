// Sending: requests go out at their scheduled times, whatever the server does (open loop), or one for each that has
// ended (closed loop). One call at a time, from one thread.
#ifndef LOADTEST_GENERATOR_SEND_H_
#define LOADTEST_GENERATOR_SEND_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>

#include "loadtest/generator/client.h"
#include "loadtest/generator/schedule.h"
#include "loadtest/generator/workload.h"

namespace dejavu {

struct SendPlan {
  uint32_t phase = 0;                      // of the workload
  std::optional<ArrivalOptions> arrivals;  // or
  bool replay = false;                     // the workload's, or
  int concurrency = 0;                     // closed loop
  double replay_speed = 1.0;
  double duration_s = 0.0;  // sends before that; 0: no limit; of arrivals, the time that they fill
  int64_t requests = 0;     // so many; 0: no limit; of arrivals, their count
  int max_in_flight = 0;    // open loop
};

struct SendFacts {
  int64_t sent = 0;
  int64_t dropped = 0;     // should have been sent when max_in_flight were under way
  double window_s = 0.0;   // from the beginning to the last scheduled send, or the duration where that was longer
  double sending_s = 0.0;  // from the beginning until the last send was done
  bool realtime = false;   // the pacing thread could get a place before all others
};

// A send begins `begin` plus its offset after which `interrupted` ends the sending. The thread sleeps until shortly
// before a send is due, and spins from there.
SendFacts SendAll(const SendPlan& plan, const Workload& workload, SteadyTime begin,
                  const std::atomic<bool>& interrupted, Client* client);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_SEND_H_
