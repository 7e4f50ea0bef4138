// ApiClient: streams of tokens through one of the APIs that the daemon speaks, by the generated synchronous client. All
// of them ask for the same: the same ids, greedy, as many new tokens as were asked for, and the ids of these. What an
// API sends beside the ids by default it sends here. One thread at a time.
#ifndef TESTS_BENCH_API_CLIENT_H_
#define TESTS_BENCH_API_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dejavu/v1/generation.pb.h"
#include "grpcpp/channel.h"
#include "grpcpp/support/status.h"

namespace dejavu {

class ApiClient {
 public:
  virtual ~ApiClient() = default;

  // Calls `on_tokens` with how many tokens a message brought, once it is read, if any.
  virtual grpc::Status Stream(int tokens, const std::function<void(int)>& on_tokens) = 0;
};

// As labels and logs call them; ours is the first.
inline const std::vector<std::string> kApis = {"dejavu", "kserve", "vllm"};

// `api` is one of them. `model` is the served model's name.
std::unique_ptr<ApiClient> MakeApiClient(const std::string& api, const std::shared_ptr<grpc::Channel>& channel,
                                         const std::string& model, const std::vector<int32_t>& prompt);

// What ours asks for.
v1::GenerateRequest OwnRequest(const std::vector<int32_t>& prompt, int tokens);

}  // namespace dejavu

#endif  // TESTS_BENCH_API_CLIENT_H_
