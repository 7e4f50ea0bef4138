// GenerationService: the methods of dejavu.v1.GenerationService. Thin: check the request, hand it to the engine, send
// what the sink makes of its tokens. Any thread.
#ifndef SERVER_API_GENERATION_SERVICE_H_
#define SERVER_API_GENERATION_SERVICE_H_

#include <atomic>
#include <memory>
#include <optional>
#include <random>
#include <string>

#include "dejavu/v1/generation.pb.h"
#include "engine/options.h"
#include "kernels/base/mutex.h"
#include "server/api/served_model.h"
#include "server/options.h"
#include "server/rpc/dispatcher.h"
#include "server/rpc/lifecycle.h"
#include "server/rpc/live_requests.h"

namespace dejavu {

class GenerationService {
 public:
  static constexpr char kName[] = "dejavu.v1.GenerationService";

  GenerationService(const ServerOptions& options, const EngineOptions& engine_options, std::string model_name,
                    const Lifecycle* lifecycle);

  void Register(Dispatcher* dispatcher);

  // Once, before the lifecycle goes on to serving. Engine and tokenizer must outlive the last call.
  void SetModel(Engine* engine, const Tokenizer* tokenizer);

  LiveRequests& live_requests() { return live_requests_; }

  // Of requests that name none. SetDefaultTier holds for those that arrive from now on; it fails as a request that asks
  // for the tier would.
  Tier default_tier() const { return default_tier_.load(std::memory_order_relaxed); }
  absl::Status SetDefaultTier(Tier tier);

  absl::Status GetServerInfo(v1::GetServerInfoResponse* response) const;
  // `caller`: the tenant whose requests alone may be ended; none: anybody's.
  absl::Status Abort(const v1::AbortRequest& request, const std::optional<std::string>& caller,
                     v1::AbortResponse* response);

  // For the handlers.
  const ServerOptions& options() const { return options_; }
  const ServedModel& model() const { return *model_if_loaded(); }
  const ServedModel* model_if_loaded() const { return model_.load(std::memory_order_acquire); }
  std::string MakeRequestId();
  uint64_t DrawSeed();  // below 2^32, so that every JSON client can hold it

 private:
  absl::Status GetModelInfo(const v1::GetModelInfoRequest& request, v1::GetModelInfoResponse* response) const;

  const ServerOptions options_;
  std::atomic<Tier> default_tier_;
  const EngineOptions engine_options_;
  const std::string model_name_;
  const Lifecycle* const lifecycle_;
  const SteadyTime started_;
  LiveRequests live_requests_;
  ServedModel model_storage_;                       // constant once model_ is set
  std::atomic<const ServedModel*> model_{nullptr};  // null while loading

  Mutex mutex_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_API_GENERATION_SERVICE_H_
