// What the server needs to know before it starts. Read once, passed down; units in the names.
#ifndef SERVER_OPTIONS_H_
#define SERVER_OPTIONS_H_

#include <cstdint>
#include <string>

#include "engine/sparsity.h"

namespace dejavu {

inline constexpr int kMaxShadowEvery = 1'000'000'000;

struct ServerOptions {
  std::string listen = "127.0.0.1:50051";  // host:port; port 0: any free one
  std::string port_file;                   // the port number is written there once the server listens; empty: nowhere
  std::string served_model_name;           // the name that requests may give; empty: last part of the model directory
  bool reflection = true;                  // grpc.reflection.v1 and v1alpha, for grpcurl and its like

  // What one request may ask for. GetServerInfo tells clients.
  int default_max_new_tokens = 128;
  int max_top_logprobs = 100;
  int max_stop_strings = 8;
  int max_stop_string_bytes = 256;
  int max_stop_token_ids = 64;
  int max_logit_bias = 300;
  int max_samples = 16;

  // Sparsity. Requests may ask for the tiers from `highest_tier` (best quality) to `lowest_tier`; the default is one of
  // them. A shadow check computes a token twice: `min_shadow_every` is what the server can spend on them.
  Tier default_tier = Tier::kExact;
  Tier highest_tier = Tier::kDense;
  Tier lowest_tier = Tier::kFast;
  int shadow_every = 256;    // where the request names no number; 0: never
  int min_shadow_every = 1;  // the smallest number but 0 that a request may name; at most kMaxShadowEvery

  // Transport.
  int64_t max_message_bytes = 4 << 20;   // the largest request that is read
  int64_t max_outbox_bytes = 256 << 10;  // per stream, of what its client has not read yet; beyond it the stream ends
  int max_concurrent_streams = 256;      // per connection; more wait in the client
  int64_t max_transport_mib = 256;       // memory of gRPC for all connections together

  // SIGTERM: health says NOT_SERVING, `drain_linger_ms` later new requests are refused, running ones may go on until
  // `drain_timeout_s` have passed since the signal.
  double drain_timeout_s = 30;
  int drain_linger_ms = 0;
  bool drain_queue = true;  // what waits then still runs; else it ends with UNAVAILABLE and retry advice

  std::string log_level = "info";  // trace, debug, info, warn, error
};

}  // namespace dejavu

#endif  // SERVER_OPTIONS_H_
