// Target: the server that a run loads: its connections, and what it says of itself before the run.
#ifndef LOADTEST_GENERATOR_TARGET_H_
#define LOADTEST_GENERATOR_TARGET_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "dejavu/v1/generation.pb.h"
#include "grpcpp/channel.h"
#include "loadtest/generator/options.h"
#include "loadtest/generator/prompts.h"
#include "nlohmann/json.hpp"

namespace dejavu {

using Metadata = std::vector<std::pair<std::string, std::string>>;

struct Target {
  Metadata metadata;                                     // options.metadata, for every call
  std::vector<std::shared_ptr<grpc::Channel>> channels;  // all connected
  v1::GetServerInfoResponse server;
  v1::GetModelInfoResponse model;
};

// Waits up to options.wait_s for a server that serves. UNAVAILABLE: nobody there, or it takes no requests.
absl::StatusOr<Target> Connect(const RunOptions& options);

// Of the corpus, or synthetic ones. Asks the server how long its tokens are.
absl::StatusOr<Prompts> MakePrompts(const RunOptions& options, const Target& target);

// As proto3's JSON.
nlohmann::ordered_json InfoJson(const v1::GetServerInfoResponse& info);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_TARGET_H_
