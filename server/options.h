// What the server needs to know before it starts. Read once, passed down; units in the names.
#ifndef SERVER_OPTIONS_H_
#define SERVER_OPTIONS_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "engine/sparsity.h"

namespace dejavu {

inline constexpr int kMaxShadowEvery = 1'000'000'000;
// Above it gRPC may end the whole connection of a call, so that the limit of the options must be far below.
inline constexpr int kTransportMetadataBytes = 32 << 10;

struct ServerOptions {
  std::string listen = "127.0.0.1:50051";  // host:port; port 0: any free one
  std::string port_file;                   // the port number is written there once the server listens; empty: nowhere
  std::string served_model_name;           // the name that requests may give; empty: last part of the model directory
  bool reflection = true;                  // grpc.reflection.v1 and v1alpha, for grpcurl and its like

  bool load_reports = true;  // ORCA: in the trailers of generations, and by xds.service.orca.v3.OpenRcaService

  // TLS on `listen` and `admin_listen`, by PEM files; empty: plain text.
  std::string tls_cert;
  std::string tls_key;
  std::string tls_client_ca;  // not empty: clients must show a certificate that follows from it
  double tls_reload_s = 10;   // between two looks at these files and at the tokens

  // Bearer tokens that callers must send, each a tenant's (server/security/tokens.h); empty: everybody may call.
  std::string auth_tokens_file;
  std::string auth_admin_tenant = "operators";  // whose tokens AdminService takes
  bool auth_allow_plaintext = false;            // tokens without TLS where the address is not loopback

  // Health alone, for probes that know neither TLS nor tokens; empty: none.
  std::string health_listen;
  std::string health_port_file;  // as port_file

  // AdminService is served there and nowhere else; empty: it is not. Without tokens everybody who reaches it may use
  // it.
  std::string admin_listen;
  std::string admin_port_file;  // as port_file

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

  // Speculation, where the request does not say otherwise: "off" or "auto"; the tier that drafts, or "none"; whether
  // what repeats itself is looked up; and how many tokens at once.
  std::string speculation_mode = "auto";
  std::string speculation_draft_tier = "high";
  bool speculation_lookup = true;
  int speculation_most_tokens = 6;
  bool speculation_allow_always = false;  // requests may have it whatever it costs others

  // Transport.
  int64_t max_message_bytes = 4 << 20;   // the largest request that is read
  int64_t max_outbox_bytes = 256 << 10;  // per stream, of what its client has not read yet; beyond it the stream ends
  int max_concurrent_streams = 256;      // per connection; more wait in the client
  int max_metadata_bytes = 16 << 10;     // of a call; gRPC itself ends connections at kTransportMetadataBytes
  int64_t max_transport_mib = 256;       // memory of gRPC for all connections together
  int64_t max_waiting_mib = 64;          // of large requests that wait to be read
  // Replies that clients have not read; a large one that does not fit ends its call.
  int64_t max_unread_mib = 128;
  int64_t max_unread_mib_per_connection = 32;
  int max_calls = 2048;                    // that are open at once; more are refused
  int max_calls_per_peer = 0;              // 0: half of them
  int max_connections = 0;                 // 0: what the limit of open files has room for, at most 4096
  int max_connections_per_peer = 0;        // 0: half of them, at most 256
  std::string transport_gateways;          // addresses of proxies, such as "127.0.0.1,10.0.0.0/8"; see AddressRange
  double max_new_connections_per_s = 200;  // of a peer, twice as many at once; 0: no limit
  double request_timeout_s = 20;           // a call whose request has not come by then ends; 0: never
  double stall_timeout_s = 60;             // so does one whose client has taken nothing for so long; 0: never
  double connection_max_idle_s = 1800;     // a connection without calls is told to go; 0: never
  // A connection of that age, give or take a tenth, is told to go (GOAWAY): what runs on it may go on for the grace.
  double connection_max_age_s = 0;        // 0: never
  double connection_max_age_grace_s = 0;  // 0: without limit

  // SIGTERM: health says NOT_SERVING, `drain_linger_ms` later new requests are refused, running ones may go on until
  // `drain_timeout_s` have passed since the signal.
  double drain_timeout_s = 30;
  int drain_linger_ms = 0;
  int drain_goaway_ms =
      0;  // after that connections are told to go (GOAWAY), nothing new gets in; 0: when all has ended
  bool drain_queue = true;  // what waits then still runs; else it ends with UNAVAILABLE and retry advice

  // HTTP, for Prometheus (/metrics) and people (/).
  std::string metrics_listen = "127.0.0.1:9464";  // host:port; port 0: any free one; empty: nowhere
  std::string metrics_port_file;
  bool metrics_per_layer = false;  // two gauges for every layer
  int metrics_tenants = 0;         // so many tenants that tokens speak for have counters of their own; 0: none

  std::string log_termination_file;  // gets the reason of an exit that is a failure; empty: none
  std::string log_level = "info";    // trace, debug, info, warn, error
  std::string log_format = "text";   // text, json
  bool log_access = true;            // a line per request
  int log_refused_per_s = 10;        // such lines of refused calls, for each code; 0: all
  int log_prompt_chars = 0;          // of a prompt's text in that line; 0: nothing of it, ever
  double log_engine_every_s = 10;    // a line about the engine, while it works; 0: never

  std::string trace_otlp_endpoint;  // host:port of a collector that takes OTLP over gRPC, in plain text; empty: none
  double trace_sample_ratio = 0;    // share of the calls without a traceparent that are traced
  int trace_max_queue = 4096;       // spans that may wait for the collector; more are dropped
};

// Whether that is host:port as options have it: "127.0.0.1:50051", "[::1]:0", "host.name:80".
bool IsHostAndPort(absl::string_view address);

}  // namespace dejavu

#endif  // SERVER_OPTIONS_H_
