// RequestRecord: what one call was, made once, at its end, for those who keep accounts: the access log, traces,
// metrics.
#ifndef SERVER_RPC_REQUEST_RECORD_H_
#define SERVER_RPC_REQUEST_RECORD_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "engine/request.h"
#include "grpcpp/support/status_code_enum.h"
#include "server/rpc/trace_context.h"

namespace dejavu {

// Strings of clients are as they sent them: any bytes, and long. Logs and traces cut them after so many.
inline constexpr size_t kMaxRecordedBytes = 256;

// What a call asks of the engine: Generate, GenerateStream and Score, once the request has been understood.
struct RequestAsked {
  std::string request_id;    // the client's or the drawn one; empty: the call has none
  std::string prompt_text;   // its first log.prompt_chars characters
  std::optional<Tier> tier;  // not for Score
  std::optional<Urgency> urgency;
  int32_t prompts = 1;              // of Score there may be more
  int32_t samples = 0;              // of all prompts together
  int64_t asked_prompt_tokens = 0;  // of a sample, as the next; also where the request was refused then
  int32_t max_new_tokens = 0;       // 0 for Score
  std::optional<uint64_t> seed;     // of the first sample; not for Score
  bool over_quota = false;          // of its tenant: refused
};

struct RequestRecord : RequestAsked {
  std::string service;  // "dejavu.v1.GenerationService"; empty: no such method
  std::string method;   // "GenerateStream"; "unknown": no such method. One of a small fixed set
  std::string tenant;   // metadata x-tenant
  std::string peer;     // "ipv4:127.0.0.1:4711"; behind a gateway "ipv4:203.0.113.7", as it says
  TraceContext trace;
  grpc::StatusCode code = grpc::StatusCode::OK;

  // As the metrics' label: length, time, eos, stop_token, stop_string, cancelled, deadline, shutdown, error; none: the
  // engine had no part in the call. Of several samples the one that ended last.
  std::string finish_reason = "none";
  bool engine() const { return finish_reason != "none"; }

  // Only with engine(). Tokens are sums over the samples.
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;
  int64_t cached_tokens = 0;      // of the prompts, not computed
  std::optional<double> density;  // of neurons: SparsityReport::mlp_density; nothing without a decoded token
  // Of several samples the first queued, scheduled and first token, and the last end. What never came is `finished`.
  SteadyTime queued, scheduled, first_token, finished;

  SteadyTime arrival;  // of the call
  SteadyTime ended;    // of the call, and of the engine's work for it
  // How long something to send lay ready while gRPC had not taken the message before it: what the client's reading
  // cost.
  double client_stall_seconds = 0.0;
};

// Whose protocol a service is, by its full name: dejavu, kserve, vllm, orca, grpc (health and reflection), or none.
absl::string_view ApiOf(absl::string_view service);

// "OK", "DEADLINE_EXCEEDED", ...
absl::string_view CodeName(grpc::StatusCode code);

// Between two tokens of a sample, by the mean length of the samples; nothing where they have one token or none.
std::optional<double> MeanInterTokenSeconds(const RequestRecord& record);

// Any number of threads at once, none of them the engine's. Must not block: a call's thread waits for it.
class RequestObserver {
 public:
  virtual ~RequestObserver() = default;
  // Once per call, also of those that were refused, after its last byte has been given to gRPC and the engine has let
  // go of it.
  virtual void OnRequestEnd(const RequestRecord& record) = 0;
};

}  // namespace dejavu

#endif  // SERVER_RPC_REQUEST_RECORD_H_
