// What a run was told to do: every flag of `dejavu-loadtest run`, as given.
#ifndef LOADTEST_GENERATOR_OPTIONS_H_
#define LOADTEST_GENERATOR_OPTIONS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "loadtest/client/channel.h"

namespace dejavu {

struct RunOptions {
  // The server.
  std::string server = "127.0.0.1:50051";
  ChannelOptions channel;
  std::vector<std::string> metadata;  // "key=value", sent with every call
  std::string model;                  // empty: whichever is served
  int connections = 8;
  double wait_s = 10.0;

  // When. Exactly one of rate, ramp, concurrency and replay.
  double rate = 0.0;
  std::string ramp;
  int concurrency = 0;
  std::string replay;
  double replay_speed = 1.0;
  std::string arrivals = "poisson";
  double burstiness = 1.0;
  uint64_t seed = 1;
  double duration_s = 0.0;  // one of them; of each step of a ramp
  int64_t requests = 0;
  double warmup_s = 0.0;
  int64_t warmup_requests = 0;
  int max_in_flight = 2048;  // of an open loop; a send beyond is dropped, and the run invalid
  double grace_s = 60.0;     // after the last send, for what is still running

  // What.
  std::string corpus;
  std::string prompt_tokens = "32", output_tokens = "32";
  bool natural_eos = false, prefix_cache = false;
  double temperature = 0.0;
  std::string tier, urgency, priority, tenant;  // mixes; empty: the server's own
  double timeout_s = 0.0;                       // deadline, from the scheduled time; 0: none
  double cancel_share = 0.0, slow_reader_share = 0.0, bad_share = 0.0;
  int cancel_after_tokens = 4;
  double slow_reader_ms = 100.0;

  // The verdict.
  std::vector<std::string> goodput;  // "ttft:200"

  // What is written.
  std::string label, metrics, json, jsonl, html;
  bool quiet = false;
};

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_OPTIONS_H_
