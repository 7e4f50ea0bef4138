// What the commands say: results on stdout, failures on stderr, and the exit codes that scripts can use.
#ifndef LOADTEST_CLI_OUTPUT_H_
#define LOADTEST_CLI_OUTPUT_H_

#include <string>

#include "dejavu/v1/generation.pb.h"
#include "grpcpp/support/status.h"
#include "nlohmann/json.hpp"

namespace dejavu {

enum ExitCode {
  kExitOk = 0,
  kExitFailed = 1,  // the request failed, or the answer is "no"
  kExitUsage = 2,
  kExitUnavailable = 3,  // nobody there, or a server that takes no requests
  kExitDeadline = 4,
  kExitInterrupted = 130,
};

// One line; text that is not UTF-8 cannot come from our server, and would be replaced.
void PrintJson(const nlohmann::ordered_json& json);

// The failure of a call: code, message and google.rpc details on stderr, with `json` also {"error": ...} on stdout.
// Returns the exit code.
int ReportFailure(const grpc::Status& status, bool interrupted, bool json);

nlohmann::ordered_json ToJson(const v1::Timings& timings);
nlohmann::ordered_json ToJson(const v1::TokenLogprob& alternative);
nlohmann::ordered_json ToJson(const google::protobuf::RepeatedPtrField<v1::ScoredToken>& prompt);
nlohmann::ordered_json ToJson(const v1::ShadowReport& shadow);
nlohmann::ordered_json ToJson(const v1::SparsityInfo& sparsity);

// "LOADING", "SERVING".
std::string StateName(v1::ServerState state);

}  // namespace dejavu

#endif  // LOADTEST_CLI_OUTPUT_H_
