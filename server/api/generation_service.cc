#include "server/api/generation_service.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"
#include "server/api/sparsity_messages.h"
#include "server/api/token_stream.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"

namespace dejavu {
namespace {

// What the engine refuses, with the details that a client needs to decide about trying again.
absl::Status RefusedByEngine(const absl::Status& status) {
  const std::optional<RefusalInfo> refusal = RefusalOf(status);
  if (!refusal.has_value() || refusal->retry_after.count() == 0) return absl::Status(status.code(), status.message());
  return RefusedWithRetry(status.code(), status.message(), Name(refusal->reason), refusal->retry_after);
}

// The first `characters` of a prompt in text, which is valid UTF-8.
std::string Beginning(absl::string_view text, int characters) {
  size_t at = 0;
  for (; at < text.size() && characters > 0; --characters) at += FirstUtf8Step(text.substr(at)).length;
  return std::string(text.substr(0, at));
}

// What the record of such a call says. Written in OnRequest, read once the call is over.
class EngineRecord final : public RecordSource {
 public:
  bool Fill(RequestRecord* record) override;

  std::string request_id;
  std::string prompt_text;
  std::optional<Tier> tier;
  std::optional<Urgency> urgency;
  int samples = 0;
  int64_t prompt_tokens = 0;
  int32_t max_new_tokens = 0;
  std::optional<uint64_t> seed;
  std::vector<std::shared_ptr<ReplySink>> sinks;  // that the engine has taken

 private:
  bool Finished() {
    return std::all_of(sinks.begin(), sinks.end(), [](const auto& sink) { return sink->outcome().has_value(); });
  }
};

bool EngineRecord::Fill(RequestRecord* record) {
  if (!Finished()) return false;
  record->request_id = request_id;
  record->prompt_text = prompt_text;
  record->tier = tier;
  record->urgency = urgency;
  record->samples = samples;
  record->asked_prompt_tokens = prompt_tokens;
  record->max_new_tokens = max_new_tokens;
  record->seed = seed;
  double density_sum = 0.0;
  int64_t decode_tokens = 0;
  for (const auto& sink : sinks) {
    const EngineOutcome outcome = *sink->outcome();
    const Finish& finish = outcome.finish;
    const bool first = !record->engine();
    record->prompt_tokens += finish.prompt_tokens;
    record->generated_tokens += finish.generated_tokens;
    record->cached_tokens += finish.cached_prompt_tokens;
    density_sum += finish.sparsity.mlp_density * static_cast<double>(finish.sparsity.decode_tokens);
    decode_tokens += finish.sparsity.decode_tokens;
    record->queued = first ? finish.queued : std::min(record->queued, finish.queued);
    record->scheduled = first ? finish.scheduled : std::min(record->scheduled, finish.scheduled);
    record->first_token = first ? finish.first_token : std::min(record->first_token, finish.first_token);
    if (first || finish.finished >= record->finished) {
      record->finished = finish.finished;
      record->finish_reason = std::string(outcome.reason);
    }
  }
  if (decode_tokens > 0) record->density = density_sum / static_cast<double>(decode_tokens);
  // Whoever ended the call told the engine no more than to cancel.
  if (record->finish_reason == "cancelled") {
    if (record->code == grpc::StatusCode::DEADLINE_EXCEEDED) record->finish_reason = "deadline";
    if (record->code == grpc::StatusCode::UNAVAILABLE) record->finish_reason = "shutdown";
  }
  return true;
}

// A call that the engine works on: Generate, GenerateStream and Score.
class EngineCall : public RpcHandler, public LiveRequest {
 public:
  explicit EngineCall(GenerationService* service) : service_(service) {}

  ~EngineCall() override {
    if (live_id_.empty()) return;
    if (!released_) service_->live_requests().Remove(live_id_);
    service_->live_requests().Done();
  }

  // What any sink has to say. The call ends with the last of them, or with the first that fails.
  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    const google::protobuf::MessageLite* reply = nullptr;
    for (size_t i = 0; i < sinks_.size() && reply == nullptr && !end->has_value(); ++i) {
      if (ended_[i]) continue;
      std::optional<absl::Status> sink_end;
      reply = sinks_[i]->NextReply(&sink_end);
      if (!sink_end.has_value()) continue;
      ended_[i] = true;
      ++ends_;
      if (!sink_end->ok() || ends_ == sinks_.size()) *end = std::move(sink_end);
    }
    if (end->has_value() && !released_) {
      if (ends_ < sinks_.size()) StopEngine();
      // Before the client hears of the end: it may use the id again at once.
      service_->live_requests().Remove(live_id_);
      released_ = true;
    }
    return reply;
  }

  void OnCancel() override { StopEngine(); }

  std::shared_ptr<RecordSource> record_source() override { return record_; }

  void Stop(const absl::Status& reason) override {
    for (const auto& sink : sinks_) sink->SetCancelReason(reason);
    StopEngine();
  }

 protected:
  // A sink for each sample; their first reply may be pulled as soon as this has returned OK.
  absl::Status Submit(const std::string& request_id, Request request, std::vector<std::shared_ptr<ReplySink>> sinks,
                      const Rpc& rpc) {
    request.deadline = rpc.deadline();
    ASSIGN_OR_RETURN(request.tenant, CheckTenant(rpc.tenant()));
    sinks_ = std::move(sinks);  // before Stop can be called
    ended_.resize(sinks_.size());
    RETURN_IF_ERROR(service_->live_requests().Add(request_id, request.tenant, this));
    live_id_ = request_id;
    const absl::StatusOr<uint64_t> engine_id =
        service_->model().engine->SubmitSamples(std::move(request), {sinks_.begin(), sinks_.end()});
    if (!engine_id.ok()) return RefusedByEngine(engine_id.status());
    record_->sinks = sinks_;
    MutexLock lock(mutex_);
    engine_id_ = *engine_id;
    if (stop_) CancelAll();
    return absl::OkStatus();
  }

  // A request that has been parsed; the checks come after it.
  template <typename ProtoRequest>
  void Note(const ProtoRequest& request) {
    record_->request_id = request.request_id().empty() ? service_->MakeRequestId() : request.request_id();
    record_->prompt_text = Beginning(request.text(), service_->options().log_prompt_chars);
  }

  GenerationService* const service_;
  const std::shared_ptr<EngineRecord> record_ = std::make_shared<EngineRecord>();

 private:
  // Beside OnRequest, possibly before the engine has given an id.
  void StopEngine() {
    MutexLock lock(mutex_);
    stop_ = true;
    if (engine_id_ != 0) CancelAll();
  }

  void CancelAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (size_t i = 0; i < sinks_.size(); ++i) service_->model().engine->Cancel(engine_id_ + i);
  }

  std::vector<std::shared_ptr<ReplySink>> sinks_;  // set in OnRequest
  std::vector<bool> ended_;                        // which of them; NextReply's, as the next
  size_t ends_ = 0;
  std::string live_id_;    // registered under this id; empty: not
  bool released_ = false;  // the id is free again; the calls to NextReply and the destructor come one by one

  Mutex mutex_;
  uint64_t engine_id_ ABSL_GUARDED_BY(mutex_) = 0;  // of the first sample; 0: not submitted
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
};

class GenerateCall final : public EngineCall {
 public:
  GenerateCall(GenerationService* service, bool streaming) : EngineCall(service), streaming_(streaming) {}

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override {
    v1::GenerateRequest request;
    RETURN_IF_ERROR(ParseMessage(bytes, &request));
    Note(request);
    if (request.sparsity().tier() == v1::TIER_UNSPECIFIED) {
      request.mutable_sparsity()->set_tier(ToMessage(service_->default_tier()));
    }
    const ServedModel& model = service_->model();
    ASSIGN_OR_RETURN(CheckedGenerate checked,
                     CheckGenerate(request, service_->options(), model, service_->DrawSeed(), streaming_));
    TokenStreamOptions options;
    options.prompt.set_request_id(record_->request_id);
    options.prompt.set_model(model.name);
    options.prompt.set_prompt_tokens(static_cast<uint32_t>(checked.request.prompt.size()));
    options.prompt.set_seed(checked.request.sampling.seed);
    options.prompt.set_max_new_tokens(static_cast<uint32_t>(checked.request.max_new_tokens));
    options.prompt.set_tier(ToMessage(checked.request.sparsity.tier));
    options.streaming = streaming_;
    record_->tier = checked.request.sparsity.tier;
    record_->urgency = checked.request.urgency;
    record_->samples = checked.samples;
    record_->prompt_tokens = static_cast<int64_t>(checked.request.prompt.size());
    record_->max_new_tokens = checked.request.max_new_tokens;
    record_->seed = checked.request.sampling.seed;
    options.tokenizer = model.tokenizer;
    options.stop_strings = std::move(checked.stop_strings);
    options.include_stop_string = checked.include_stop_string;
    options.max_outbox_bytes = service_->options().max_outbox_bytes;
    options.arrival = rpc->arrival();
    std::vector<std::shared_ptr<ReplySink>> streams;
    for (int i = 0; i < checked.samples; ++i) {
      options.sample = static_cast<uint32_t>(i);
      streams.push_back(std::make_shared<TokenStream>(options, [rpc] { rpc->Wake(); }));
      options.prompt.set_seed(options.prompt.seed() + 1);
    }
    gathers_ = !streaming_ && checked.samples > 1;
    return Submit(options.prompt.request_id(), std::move(checked.request), std::move(streams), *rpc);
  }

  // One reply must hold all samples: each of them gives one chunk, when it has ended.
  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    if (!gathers_) return EngineCall::NextReply(end);
    while (const auto* reply = static_cast<const v1::GenerateChunk*>(EngineCall::NextReply(end))) {
      if (reply->sample() >= static_cast<uint32_t>(chunks_.size())) chunks_.resize(reply->sample() + 1);
      chunks_[reply->sample()] = *reply;
      if (end->has_value()) break;
    }
    if (!end->has_value() || !(*end)->ok()) return nullptr;
    v1::GenerateChunk& first = chunks_[0];
    response_.mutable_prompt()->Swap(first.mutable_prompt());
    response_.mutable_text()->swap(*first.mutable_text());
    response_.mutable_token_ids()->Swap(first.mutable_token_ids());
    response_.mutable_logprobs()->Swap(first.mutable_logprobs());
    response_.mutable_finish()->Swap(first.mutable_finish());
    for (size_t i = 1; i < chunks_.size(); ++i) response_.add_more_samples()->Swap(&chunks_[i]);
    return &response_;
  }

 private:
  const bool streaming_;
  bool gathers_ = false;
  std::vector<v1::GenerateChunk> chunks_;  // by sample
  v1::GenerateResponse response_;
};

class ScoreCall final : public EngineCall {
 public:
  using EngineCall::EngineCall;

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override {
    v1::ScoreRequest request;
    RETURN_IF_ERROR(ParseMessage(bytes, &request));
    Note(request);
    ASSIGN_OR_RETURN(Request checked, CheckScore(request, service_->options(), service_->model()));
    v1::ScoreResponse response;
    response.set_request_id(record_->request_id);
    response.set_model(service_->model().name);
    record_->urgency = checked.urgency;
    record_->samples = 1;
    auto collector = std::make_shared<ScoreCollector>(std::move(response), rpc->arrival(), [rpc] { rpc->Wake(); });
    return Submit(record_->request_id, std::move(checked), {std::move(collector)}, *rpc);
  }
};

class AbortCall final : public RpcHandler {
 public:
  explicit AbortCall(GenerationService* service) : service_(service) {}

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override {
    v1::AbortRequest request;
    RETURN_IF_ERROR(ParseMessage(bytes, &request));
    // Without tokens a tenant is only what a caller says.
    const bool known = !service_->options().auth_tokens_file.empty();
    return service_->Abort(request, known ? std::optional<std::string>(rpc->tenant()) : std::nullopt, &response_);
  }

  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    *end = absl::OkStatus();
    return &response_;
  }

 private:
  GenerationService* const service_;
  v1::AbortResponse response_;
};

v1::ServerState StateOf(Phase phase) {
  switch (phase) {
    case Phase::kLoading:
      return v1::SERVER_STATE_LOADING;
    case Phase::kWarming:
      return v1::SERVER_STATE_WARMING;
    case Phase::kServing:
      return v1::SERVER_STATE_SERVING;
    case Phase::kLeaving:
    case Phase::kDraining:
    case Phase::kStopped:
      return v1::SERVER_STATE_DRAINING;
    case Phase::kFailed:
      return v1::SERVER_STATE_FAILED;
  }
  return v1::SERVER_STATE_UNSPECIFIED;
}

// The input is limited, what becomes of it is not.
absl::Status CheckReplySize(const google::protobuf::MessageLite& reply) {
  const int64_t bytes = static_cast<int64_t>(reply.ByteSizeLong());
  if (bytes <= kMaxReplyBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the reply has ", bytes, " bytes; at most ", kMaxReplyBytes, " can be sent: split the request"));
}

}  // namespace

GenerationService::GenerationService(const ServerOptions& options, const EngineOptions& engine_options,
                                     std::string model_name, const Lifecycle* lifecycle)
    : options_(options),
      default_tier_(options.default_tier),
      engine_options_(engine_options),
      model_name_(std::move(model_name)),
      lifecycle_(lifecycle),
      started_(std::chrono::steady_clock::now()),
      random_(std::random_device{}()) {}

void GenerationService::Register(Dispatcher* dispatcher) {
  dispatcher->Register(kName, "Generate", [this] { return std::make_unique<GenerateCall>(this, /*streaming=*/false); });
  dispatcher->Register(kName, "GenerateStream",
                       [this] { return std::make_unique<GenerateCall>(this, /*streaming=*/true); });
  dispatcher->Register(kName, "Score", [this] { return std::make_unique<ScoreCall>(this); });
  dispatcher->RegisterUnary<v1::TokenizeRequest, v1::TokenizeResponse>(
      kName, "Tokenize", [this](const v1::TokenizeRequest& request, v1::TokenizeResponse* response) {
        ASSIGN_OR_RETURN(const std::vector<int32_t> ids, CheckTokenize(request, model()));
        response->mutable_token_ids()->Add(ids.begin(), ids.end());
        return CheckReplySize(*response);
      });
  dispatcher->RegisterUnary<v1::DetokenizeRequest, v1::DetokenizeResponse>(
      kName, "Detokenize", [this](const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response) {
        ASSIGN_OR_RETURN(*response->mutable_text(), CheckDetokenize(request, model()));
        return CheckReplySize(*response);
      });
  dispatcher->RegisterUnary<v1::GetModelInfoRequest, v1::GetModelInfoResponse>(
      kName, "GetModelInfo", [this](const v1::GetModelInfoRequest& request, v1::GetModelInfoResponse* response) {
        return GetModelInfo(request, response);
      });
  dispatcher->RegisterUnary<v1::GetServerInfoRequest, v1::GetServerInfoResponse>(
      kName, "GetServerInfo",
      [this](const v1::GetServerInfoRequest&, v1::GetServerInfoResponse* response) { return GetServerInfo(response); });
  dispatcher->Register(kName, "Abort", [this] { return std::make_unique<AbortCall>(this); });
}

void GenerationService::SetModel(Engine* engine, const Tokenizer* tokenizer) {
  CHECK(model_.load() == nullptr) << "the model is set once";
  model_storage_ = {model_name_, engine->model().vocab, engine->model().context, tokenizer, engine};
  model_.store(&model_storage_, std::memory_order_release);
}

absl::Status GenerationService::SetDefaultTier(Tier tier) {
  RETURN_IF_ERROR(CheckTier(ToMessage(tier), options_, model()).status());
  default_tier_.store(tier, std::memory_order_relaxed);
  return absl::OkStatus();
}

std::string GenerationService::MakeRequestId() {
  MutexLock lock(mutex_);
  return absl::StrFormat("req-%016x", random_());
}

uint64_t GenerationService::DrawSeed() {
  MutexLock lock(mutex_);
  return random_() >> 32;
}

absl::Status GenerationService::GetModelInfo(const v1::GetModelInfoRequest& request,
                                             v1::GetModelInfoResponse* response) const {
  RETURN_IF_ERROR(CheckModelName(request.model(), model()));
  const Engine& engine = *model().engine;
  const ModelShape& config = engine.model();
  response->set_model(model().name);
  response->set_architecture(kModelFamily);
  response->set_layers(static_cast<uint32_t>(config.layers));
  response->set_hidden_size(static_cast<uint32_t>(config.hidden));
  response->set_attention_heads(static_cast<uint32_t>(config.heads));
  response->set_ffn_size(static_cast<uint32_t>(config.ffn));
  response->set_vocabulary_size(static_cast<uint32_t>(config.vocab));
  response->set_context_tokens(static_cast<uint32_t>(config.context));
  response->set_weight_dtype(engine.weight_type());
  response->set_weight_bytes(static_cast<uint64_t>(engine.weight_bytes()));
  response->set_has_tokenizer(model().tokenizer != nullptr);
  response->set_bos_token_id(static_cast<uint32_t>(config.bos_token));
  response->set_eos_token_id(static_cast<uint32_t>(config.eos_token));
  return absl::OkStatus();
}

absl::Status GenerationService::GetServerInfo(v1::GetServerInfoResponse* response) const {
  response->set_version(DEJAVU_VERSION);
  response->set_state(StateOf(lifecycle_->phase()));
  response->set_model(model_name_);
  response->set_uptime_seconds(std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count());

  v1::Limits* limits = response->mutable_limits();
  limits->set_max_batch(static_cast<uint32_t>(engine_options_.scheduler.max_batch));
  limits->set_max_waiting_requests(static_cast<uint32_t>(engine_options_.admission.max_waiting_requests));
  limits->set_default_max_new_tokens(static_cast<uint32_t>(options_.default_max_new_tokens));
  limits->set_max_top_logprobs(static_cast<uint32_t>(options_.max_top_logprobs));
  limits->set_max_stop_strings(static_cast<uint32_t>(options_.max_stop_strings));
  limits->set_max_stop_string_bytes(static_cast<uint32_t>(options_.max_stop_string_bytes));
  limits->set_max_stop_token_ids(static_cast<uint32_t>(options_.max_stop_token_ids));
  limits->set_max_logit_bias(static_cast<uint32_t>(options_.max_logit_bias));
  limits->set_max_message_bytes(static_cast<uint64_t>(options_.max_message_bytes));
  limits->set_max_samples(static_cast<uint32_t>(options_.max_samples));
  limits->set_max_waiting_tokens(static_cast<uint64_t>(engine_options_.admission.max_waiting_tokens));
  limits->set_tenant_max_waiting_requests(static_cast<uint32_t>(engine_options_.admission.tenant_max_waiting_requests));
  limits->set_tenant_max_waiting_tokens(static_cast<uint64_t>(engine_options_.admission.tenant_max_waiting_tokens));

  const ServedModel* const model = model_.load(std::memory_order_acquire);
  FillInfo(options_, model == nullptr ? nullptr : model->engine, response->mutable_sparsity());
  response->mutable_sparsity()->set_default_tier(ToMessage(default_tier()));
  if (model == nullptr) return absl::OkStatus();  // still loading: no backend and no load to speak of
  response->set_backend(model->engine->backend_description());
  response->set_synthetic(model->engine->synthetic());
  const EngineStats stats = model->engine->stats();
  v1::Load* load = response->mutable_load();
  load->set_running_requests(static_cast<uint32_t>(stats.running));
  load->set_waiting_requests(static_cast<uint32_t>(stats.waiting));
  load->set_kv_blocks_total(static_cast<uint32_t>(stats.kv_blocks_total));
  load->set_kv_blocks_free(static_cast<uint32_t>(stats.kv_blocks_free));
  load->set_steps(static_cast<uint64_t>(stats.steps));
  load->set_prompt_tokens(static_cast<uint64_t>(stats.prompt_tokens));
  load->set_generated_tokens(static_cast<uint64_t>(stats.generated_tokens));
  load->set_kv_blocks_cached(static_cast<uint32_t>(stats.kv_blocks_cached));
  load->set_cached_prompt_tokens(static_cast<uint64_t>(stats.cached_prompt_tokens));
  load->set_preemptions(static_cast<uint64_t>(stats.preemptions));
  v1::Admission* admission = response->mutable_admission();
  admission->set_received(static_cast<uint64_t>(stats.account.received));
  admission->set_finished(static_cast<uint64_t>(stats.account.finished));
  admission->set_cancelled(static_cast<uint64_t>(stats.account.cancelled));
  admission->set_failed(static_cast<uint64_t>(stats.account.failed));
  admission->set_live(static_cast<uint64_t>(stats.account.live));
  for (int i = 0; i < kRefusals; ++i) {
    (*admission->mutable_refused())[Name(static_cast<Refusal>(i))] = static_cast<uint64_t>(stats.account.refused[i]);
  }
  v1::CostModel* costs = response->mutable_cost_model();
  costs->set_steps(static_cast<uint64_t>(stats.cost_steps));
  costs->set_dense_ms(stats.costs.dense_ms);
  costs->set_exact_ms(stats.costs.exact_ms);
  costs->set_predicted_ms(stats.costs.predicted_ms);
  costs->set_row_ms(stats.costs.row_ms);
  costs->set_prefill_token_ms(stats.costs.prefill_token_ms);
  costs->set_context_token_ms(stats.costs.context_token_ms);
  return absl::OkStatus();
}

absl::Status GenerationService::Abort(const v1::AbortRequest& request, const std::optional<std::string>& caller,
                                      v1::AbortResponse* response) {
  if (request.request_id().empty()) return InvalidField("request_id", "is empty; name the request to end");
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  ASSIGN_OR_RETURN(const bool found,
                   live_requests_.Stop(request.request_id(), caller, absl::CancelledError("the request was aborted")));
  response->set_found(found);
  return absl::OkStatus();
}

}  // namespace dejavu
