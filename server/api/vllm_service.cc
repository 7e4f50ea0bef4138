#include "server/api/vllm_service.h"

#include <algorithm>
#include <memory>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "server/api/abort.h"
#include "server/api/generate_call.h"
#include "server/api/server_info.h"
#include "server/api/service_names.h"
#include "server/api/tokenizer_archive.h"
#include "server/api/validate.h"
#include "server/api/vllm_dialect.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"
#include "vllm/engine.pb.h"

namespace dejavu {
namespace {

namespace engine = vllm::grpc::engine;

absl::Status GetVllmModelInfo(const ServingState& state, const engine::GetModelInfoRequest& /*request*/,
                              engine::GetModelInfoResponse* response) {
  const ModelShape& shape = state.model().engine->model();
  // Where files are is not told: a gateway gets them by GetTokenizer.
  response->set_model_path(state.model().name);
  response->set_served_model_name(state.model().name);
  response->set_is_generation(true);
  response->set_max_context_length(static_cast<uint32_t>(shape.context));
  response->set_max_req_input_len(shape.context);
  response->set_vocab_size(static_cast<uint32_t>(shape.vocab));
  response->set_model_type(kModelFamily);
  response->add_architectures("OPTForCausalLM");
  for (const int32_t id : shape.eos_tokens) response->add_eos_token_ids(id);
  response->set_bos_token_id(shape.bos_token.value_or(0));
  return absl::OkStatus();
}

absl::Status GetVllmServerInfo(const ServingState& state, const engine::GetServerInfoRequest& /*request*/,
                               engine::GetServerInfoResponse* response) {
  response->set_server_type("vllm-grpc");  // whose protocol it is
  response->set_uptime_seconds(SecondsSince(state.started()));
  response->set_is_paused(state.phase() != Phase::kServing);
  response->set_data_parallel_size(1);
  response->set_kv_cache_dtype(state.engine_options().kv.dtype);
  response->set_block_size(state.engine_options().kv.block_tokens);
  response->set_model_dtype(state.model().engine->weight_type());
  response->set_max_num_seqs(state.engine_options().scheduler.max_batch);
  return absl::OkStatus();
}

absl::Status GetLoads(const ServingState& state, const std::string& tenant, const engine::GetLoadsRequest& request,
                      engine::GetLoadsResponse* response) {
  RETURN_IF_ERROR(CheckMayKnowLoad(state, tenant));
  if (request.has_dp_rank() && request.dp_rank() != 0) {
    return InvalidField("dp_rank", absl::StrCat("is ", request.dp_rank(), "; there is one, 0"));
  }
  const EngineStats stats = state.model().engine->stats();
  const int32_t block_tokens = state.engine_options().kv.block_tokens;
  const int32_t used = stats.kv_blocks_total - stats.kv_blocks_free;
  response->set_timestamp(absl::FormatTime(absl::RFC3339_full, absl::Now(), absl::UTCTimeZone()));
  response->set_version(DEJAVU_VERSION);
  response->set_dp_rank_count(1);
  engine::SchedulerLoad* const load = response->add_loads();
  load->set_num_running_reqs(stats.running);
  load->set_num_waiting_reqs(stats.waiting);
  load->set_num_total_reqs(stats.running + stats.waiting);
  load->set_num_used_tokens(used * block_tokens);
  load->set_max_total_num_tokens(stats.kv_blocks_total * block_tokens);
  load->set_token_usage(static_cast<double>(used) / std::max(1, stats.kv_blocks_total));
  const int64_t prompts = stats.prompt_tokens + stats.cached_prompt_tokens;
  load->set_cache_hit_rate(prompts == 0 ? 0.0 : static_cast<double>(stats.cached_prompt_tokens) / prompts);
  load->set_max_running_requests(state.engine_options().scheduler.max_batch);
  load->set_num_waiting_uncached_tokens(static_cast<int32_t>(stats.waiting_tokens));
  return absl::OkStatus();
}

// Ids that nobody has, or no more, are passed over: a gateway aborts what may have ended.
absl::Status AbortAll(ServingState& state, const std::string& tenant, const engine::AbortRequest& request,
                      engine::AbortResponse* /*response*/) {
  for (const std::string& id : request.request_ids()) RETURN_IF_ERROR(CheckRequestId(id));
  for (const std::string& id : request.request_ids()) AbortOwn(state, tenant, id);
  return absl::OkStatus();
}

// The archive, in pieces that every client takes.
class GetTokenizerCall final : public RpcHandler {
 public:
  GetTokenizerCall(const ServingState* state, TokenizerArchives* archives) : state_(*state), archives_(*archives) {}

  bool large_replies() const override { return true; }

  absl::Status OnRequest(const std::shared_ptr<Rpc>& /*rpc*/, const grpc::ByteBuffer& bytes) override {
    smg::grpc::common::GetTokenizerRequest request;
    RETURN_IF_ERROR(ParseMessage(bytes, &request));
    if (state_.model().tokenizer == nullptr) return MissingFeature("tokenizer", "the model has no tokenizer");
    ASSIGN_OR_RETURN(archive_, archives_.Get(state_.engine_options().model));
    return absl::OkStatus();
  }

  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    constexpr size_t kPieceBytes = 1 << 20;
    *chunk_.mutable_data() = archive_->bytes.substr(at_, kPieceBytes);
    at_ += chunk_.data().size();
    if (at_ < archive_->bytes.size()) return &chunk_;
    chunk_.set_sha256(archive_->sha256);
    *end = absl::OkStatus();
    return &chunk_;
  }

  void ReleaseReply() override { archive_.reset(); }

 private:
  const ServingState& state_;
  TokenizerArchives& archives_;
  std::shared_ptr<const TokenizerArchive> archive_;
  size_t at_ = 0;
  smg::grpc::common::GetTokenizerChunk chunk_;
};

}  // namespace

void RegisterVllm(ServingState* state, const Health* health, Dispatcher* dispatcher) {
  const std::string name = kVllmService;
  const Needs always = {Caller::kTenant, Resource::kNone};
  const Needs model = {Caller::kTenant, Resource::kModel};
  const Needs capacity = {Caller::kTenant, Resource::kCapacity};

  dispatcher->RegisterUnary<engine::HealthCheckRequest, engine::HealthCheckResponse>(
      name, "HealthCheck", {Caller::kAnybody, Resource::kNone},
      [state, health](const Rpc&, const auto&, engine::HealthCheckResponse* response) {
        response->set_healthy(health->Status("") == grpc::health::v1::HealthCheckResponse::SERVING);
        response->set_message(Name(StateOf(state->phase())));
        return absl::OkStatus();
      });
  dispatcher->Register(name, "Generate", capacity,
                       [state] { return std::make_unique<GenerateCall>(state, std::make_unique<VllmDialect>()); });
  dispatcher->RegisterUnary(name, "Abort", always, state, AbortAll);
  dispatcher->RegisterUnary(name, "GetModelInfo", model, state, GetVllmModelInfo);
  dispatcher->RegisterUnary(name, "GetServerInfo", model, state, GetVllmServerInfo);
  dispatcher->RegisterUnary(name, "GetLoads", model, state, GetLoads);
  dispatcher->Register(name, "GetTokenizer", model, [state, archives = std::make_shared<TokenizerArchives>()] {
    return std::make_unique<GetTokenizerCall>(state, archives.get());
  });
}

}  // namespace dejavu
