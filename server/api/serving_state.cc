#include "server/api/serving_state.h"

#include <chrono>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/api/sparsity_messages.h"
#include "server/api/validate.h"

namespace dejavu {

ServingState::ServingState(const ServerOptions& options, const EngineOptions& engine_options, std::string model_name,
                           const Lifecycle* lifecycle, const Tokens* tokens)
    : options_(options),
      engine_options_(engine_options),
      model_name_(std::move(model_name)),
      lifecycle_(lifecycle),
      tokens_(tokens),
      started_(std::chrono::steady_clock::now()),
      default_tier_(options.default_tier) {}

void ServingState::SetModel(Engine* engine, const Tokenizer* tokenizer) {
  CHECK(model_.load() == nullptr) << "the model is set once";
  model_storage_ = {model_name_, engine->model().vocab, engine->model().context, tokenizer, engine};
  model_.store(&model_storage_, std::memory_order_release);
}

absl::Status ServingState::SetDefaultTier(Tier tier) {
  RETURN_IF_ERROR(CheckTier(ToMessage(tier), options_, model()).status());
  default_tier_.store(tier, std::memory_order_relaxed);
  return absl::OkStatus();
}

}  // namespace dejavu
