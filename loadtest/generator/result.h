// The result document of a run: the keys of `vllm bench serve`, and beside them what makes it believable. Latencies and
// goodput are of the normal requests that were answered. docs/measuring.md, "Load", tells what the keys mean.
#ifndef LOADTEST_GENERATOR_RESULT_H_
#define LOADTEST_GENERATOR_RESULT_H_

#include <optional>
#include <string>
#include <vector>

#include "loadtest/generator/options.h"
#include "loadtest/generator/recorder.h"
#include "loadtest/generator/schedule.h"
#include "loadtest/generator/send.h"
#include "loadtest/generator/target.h"
#include "nlohmann/json.hpp"

namespace dejavu {

// Above this the generator measured itself, not the server.
inline constexpr double kMaxLagP99Ms = 1.0;

struct RunFacts {
  SendPlan plan;
  SendFacts sending;
  double cpu_s = 0.0;  // of this process, user and system, during the run
  int64_t warmup_requests = 0;
  int64_t abandoned = 0;  // did not end within grace_s after the last send
  bool interrupted = false;
  std::optional<Ramp> ramp;  // and the step in it
  int step = 0;
};

// `config` holds every flag.
nlohmann::ordered_json MakeResult(const RunOptions& options, nlohmann::ordered_json config, const Target& target,
                                  const RunFacts& facts, const Objectives& objectives, const Recorder& recorder);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_RESULT_H_
