// ServingState: what calls, the operators' service and the status page ask of the daemon: its options, the model that
// it serves, the phase that it is in, the requests that are under way, the tier of requests that name none. Any thread.
#ifndef SERVER_API_SERVING_STATE_H_
#define SERVER_API_SERVING_STATE_H_

#include <atomic>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "engine/options.h"
#include "kernels/base/clock.h"
#include "server/api/load_meter.h"
#include "server/api/served_model.h"
#include "server/options.h"
#include "server/rpc/lifecycle.h"
#include "server/rpc/live_requests.h"
#include "server/rpc/quotas.h"
#include "server/security/tokens.h"

namespace dejavu {

class ServingState {
 public:
  // Lifecycle and tokens must outlive the object. Null tokens: everybody may call.
  ServingState(const ServerOptions& options, const EngineOptions& engine_options, std::string model_name,
               const Lifecycle* lifecycle, const Tokens* tokens = nullptr);

  const ServerOptions& options() const { return options_; }
  const EngineOptions& engine_options() const { return engine_options_; }
  const std::string& model_name() const { return model_name_; }
  Phase phase() const { return lifecycle_->phase(); }
  SteadyTime started() const { return started_; }

  // Once, before the lifecycle goes on to serving. Engine and tokenizer must outlive the last call.
  void SetModel(Engine* engine, const Tokenizer* tokenizer);
  const ServedModel* model_if_loaded() const { return model_.load(std::memory_order_acquire); }
  // In methods that were registered as needing a model.
  const ServedModel& model() const { return *model_if_loaded(); }

  LiveRequests& live_requests() { return live_requests_; }
  LoadMeter& load_meter() { return load_meter_; }

  // Tokens say whose a call is. Otherwise a tenant is only what a caller says.
  bool knows_tenants() const { return tokens_ != nullptr; }
  TenantLimits LimitsOf(const std::string& tenant) const {
    return tokens_ == nullptr ? TenantLimits() : tokens_->LimitsOf(tenant);
  }
  const std::shared_ptr<Quotas>& quotas() const { return quotas_; }

  // Of requests that name none. SetDefaultTier holds for those that arrive from now on; it fails as a request that asks
  // for the tier would.
  Tier default_tier() const { return default_tier_.load(std::memory_order_relaxed); }
  absl::Status SetDefaultTier(Tier tier);

 private:
  const ServerOptions options_;
  const EngineOptions engine_options_;
  const std::string model_name_;
  const Lifecycle* const lifecycle_;
  const Tokens* const tokens_;
  const std::shared_ptr<Quotas> quotas_ = std::make_shared<Quotas>();  // leases hold it too
  const SteadyTime started_;
  std::atomic<Tier> default_tier_;
  LiveRequests live_requests_;
  LoadMeter load_meter_;
  ServedModel model_storage_;                       // constant once model_ is set
  std::atomic<const ServedModel*> model_{nullptr};  // null while loading
};

}  // namespace dejavu

#endif  // SERVER_API_SERVING_STATE_H_
