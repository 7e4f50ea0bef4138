#include "server/api/vllm_dialect.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/api/sampling_parameters.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"

namespace dejavu {
namespace {

namespace engine = vllm::grpc::engine;

// What a later version of the protocol may have added must not be passed over.
absl::Status CheckKnown(absl::string_view where, const google::protobuf::Message& message) {
  const auto& unknown = message.GetReflection()->GetUnknownFields(message);
  if (unknown.empty()) return absl::OkStatus();
  return InvalidField(where, absl::StrCat("has the field number ", unknown.field(0).number(),
                                          ", which is not known here (smg-grpc-proto 0.4.28 is)"));
}

absl::Status NotServed(absl::string_view field) { return InvalidField(field, "is not served here"); }

absl::Status CheckInputs(const engine::GenerateRequest& request) {
  RETURN_IF_ERROR(CheckKnown("GenerateRequest", request));
  if (request.has_mm_inputs()) return NotServed("mm_inputs");
  if (request.extra_mm_inputs_size() > 0) return NotServed("extra_mm_inputs");
  if (request.has_media_refs()) return NotServed("media_refs");
  if (request.has_kv_transfer_params()) return NotServed("kv_transfer_params");
  if (!request.kv_transfer_params_json().empty()) return NotServed("kv_transfer_params_json");
  if (request.has_data_parallel_rank() && request.data_parallel_rank() != 0) {
    return InvalidField("data_parallel_rank", absl::StrCat("is ", request.data_parallel_rank(), "; there is one, 0"));
  }
  return absl::OkStatus();
}

absl::Status CheckUnserved(const engine::SamplingParams& params) {
  RETURN_IF_ERROR(CheckKnown("sampling_params", params));
  switch (params.constraint_case()) {
    case engine::SamplingParams::kJsonSchema:
      return NotServed("json_schema");
    case engine::SamplingParams::kRegex:
      return NotServed("regex");
    case engine::SamplingParams::kGrammar:
      return NotServed("grammar");
    case engine::SamplingParams::kStructuralTag:
      return NotServed("structural_tag");
    case engine::SamplingParams::kJsonObject:
      return NotServed("json_object");
    case engine::SamplingParams::kChoice:
      return NotServed("choice");
    case engine::SamplingParams::CONSTRAINT_NOT_SET:
      break;
  }
  if (params.grammar_from_first_token()) return NotServed("grammar_from_first_token");
  return absl::OkStatus();
}

// 0 is "not said" where vLLM's servicer takes it so.
absl::Status ReadSampling(const engine::SamplingParams& params, v1::GenerateRequest* request) {
  v1::Sampling& sampling = *request->mutable_sampling();
  sampling.set_temperature(params.has_temperature() ? params.temperature() : 1.0f);
  if (params.top_p() != 0.0f) sampling.set_top_p(params.top_p());
  sampling.set_top_k(params.top_k());
  sampling.set_min_p(params.min_p());
  sampling.set_samples(params.n());
  if (params.seed() < -1) return InvalidField("seed", absl::StrCat("is ", params.seed(), "; it must be at least 0"));
  if (params.has_seed() && params.seed() >= 0) sampling.set_seed(static_cast<uint64_t>(params.seed()));
  v1::Penalties& penalties = *request->mutable_penalties();
  penalties.set_frequency(params.frequency_penalty());
  penalties.set_presence(params.presence_penalty());
  if (params.repetition_penalty() != 0.0f) penalties.set_repetition(params.repetition_penalty());
  for (const auto& [id, bias] : params.logit_bias()) {
    if (id < 0) return InvalidField(absl::StrCat("logit_bias[", id, "]"), "names no token id");
    (*penalties.mutable_logit_bias())[static_cast<uint32_t>(id)] = bias;
  }
  return absl::OkStatus();
}

absl::Status ReadStopping(const engine::SamplingParams& params, v1::GenerateRequest* request) {
  v1::Stopping& stopping = *request->mutable_stopping();
  if (params.has_max_tokens()) stopping.set_max_new_tokens(params.max_tokens());
  stopping.set_min_new_tokens(params.min_tokens());
  *stopping.mutable_stop_strings() = params.stop();
  *stopping.mutable_stop_token_ids() = params.stop_token_ids();
  stopping.set_ignore_eos(params.ignore_eos());
  stopping.set_include_stop_string(params.include_stop_str_in_output());
  return absl::OkStatus();
}

// -1 is all of the vocabulary.
absl::StatusOr<uint32_t> TopOf(absl::string_view field, int32_t count) {
  if (count >= 0) return static_cast<uint32_t>(count);
  return InvalidField(field, absl::StrCat("is ", count, "; all of the vocabulary is not served here"));
}

absl::Status ReadLogprobs(const engine::SamplingParams& params, v1::GenerateRequest* request) {
  v1::Output& output = *request->mutable_output();
  if (params.has_logprobs()) {
    output.set_logprobs(true);
    ASSIGN_OR_RETURN(const uint32_t top, TopOf("logprobs", params.logprobs()));
    output.set_top_logprobs(top);
  }
  if (params.has_prompt_logprobs()) {
    output.set_prompt_logprobs(true);
    ASSIGN_OR_RETURN(const uint32_t top, TopOf("prompt_logprobs", params.prompt_logprobs()));
    output.set_prompt_top_logprobs(top);
  }
  return absl::OkStatus();
}

void FillTop(const google::protobuf::RepeatedPtrField<v1::TokenLogprob>& alternatives, engine::TopLogProbs* top) {
  for (const v1::TokenLogprob& alternative : alternatives) {
    top->add_values(alternative.logprob());
    top->add_token_ids(alternative.id());
  }
}

void FillLogprobs(const v1::GenerateChunk& chunk, engine::OutputLogProbs* output) {
  for (int i = 0; i < chunk.logprobs_size(); ++i) {
    const v1::TokenLogprobs& logprobs = chunk.logprobs(i);
    output->add_token_logprobs(logprobs.logprob());
    output->add_token_ids(chunk.token_ids(i));
    if (logprobs.top().empty()) continue;
    FillTop(logprobs.top(), output->add_top_logprobs());
  }
}

// Alternatives are those to the token, where ours are those to what follows it. The first token has none.
void FillLogprobs(const google::protobuf::RepeatedPtrField<v1::ScoredToken>& prompt, engine::InputLogProbs* input) {
  const bool tops = !prompt[0].top().empty();
  for (int i = 0; i < prompt.size(); ++i) {
    engine::InputTokenLogProb* const logprob = input->add_token_logprobs();
    if (prompt[i].has_logprob()) logprob->set_value(prompt[i].logprob());
    input->add_token_ids(prompt[i].id());
    if (!tops) continue;
    engine::TopLogProbs* const top = input->add_top_logprobs();
    if (i > 0) FillTop(prompt[i - 1].top(), top);
  }
}

}  // namespace

absl::Status VllmDialect::Read(const grpc::ByteBuffer& bytes, v1::GenerateRequest* request) {
  engine::GenerateRequest theirs;
  RETURN_IF_ERROR(ParseMessage(bytes, &theirs));
  request->set_request_id(theirs.request_id());
  stream_ = theirs.stream();
  switch (theirs.input_case()) {
    case engine::GenerateRequest::kText:
      request->mutable_text()->swap(*theirs.mutable_text());
      break;
    case engine::GenerateRequest::kTokenized:
      request->mutable_token_ids()->mutable_ids()->Swap(theirs.mutable_tokenized()->mutable_input_ids());
      break;
    case engine::GenerateRequest::INPUT_NOT_SET:
      break;  // refused with the rest
  }
  RETURN_IF_ERROR(CheckInputs(theirs));
  RETURN_IF_ERROR(CheckUnserved(theirs.sampling_params()));
  RETURN_IF_ERROR(ReadSampling(theirs.sampling_params(), request));
  RETURN_IF_ERROR(ReadStopping(theirs.sampling_params(), request));
  if (theirs.sampling_params().has_truncate_prompt_tokens()) {
    request->set_truncate_prompt_tokens(theirs.sampling_params().truncate_prompt_tokens());
  }
  return ReadLogprobs(theirs.sampling_params(), request);
}

absl::Status VllmDialect::Renamed(absl::Status status) const { return WithFieldNames(std::move(status), VllmNames()); }

void VllmDialect::Take(v1::GenerateChunk* chunk) {
  if (chunk->has_prompt()) prompt_tokens_ = chunk->prompt().prompt_tokens();
  prompt_.MergeFrom(chunk->prompt_logprobs());
  chunk_ = chunk->token_ids_size() > 0 || chunk->has_finish() ? chunk : nullptr;
  chunk_sent_ = false;
}

const google::protobuf::MessageLite* VllmDialect::Next(bool* more) {
  *more = false;
  if (chunk_ == nullptr) return nullptr;
  response_.Clear();
  if (!stream_ || chunk_sent_ || chunk_->token_ids().empty()) {
    FillComplete(*chunk_);
    chunk_ = nullptr;
    return &response_;
  }
  engine::GenerateStreamChunk* const chunk = response_.mutable_chunk();
  *chunk->mutable_token_ids() = chunk_->token_ids();
  chunk->set_prompt_tokens(prompt_tokens_);
  chunk->set_completion_tokens(static_cast<uint32_t>(chunk_->token_ids_size()));  // of this chunk, as vLLM has it
  chunk->set_cached_tokens(chunk_->finish().cached_prompt_tokens());
  if (chunk_->logprobs_size() > 0) FillLogprobs(*chunk_, chunk->mutable_output_logprobs());
  TellPrompt(*chunk_, chunk);
  chunk->set_index(chunk_->sample());
  chunk_sent_ = *more = chunk_->has_finish();
  if (!*more) chunk_ = nullptr;
  return &response_;
}

// In the first reply of the first sample.
template <typename Reply>
void VllmDialect::TellPrompt(const v1::GenerateChunk& chunk, Reply* reply) {
  if (chunk.sample() > 0 || prompt_.empty()) return;
  FillLogprobs(prompt_, reply->mutable_input_logprobs());
  prompt_.Clear();
}

void VllmDialect::FillComplete(const v1::GenerateChunk& chunk) {
  const v1::Finish& finish = chunk.finish();
  engine::GenerateComplete* const complete = response_.mutable_complete();
  *complete->mutable_output_ids() = chunk.token_ids();
  complete->set_finish_reason(finish.reason() == v1::FINISH_REASON_LENGTH ? "length" : "stop");
  complete->set_prompt_tokens(finish.prompt_tokens());
  complete->set_completion_tokens(finish.generated_tokens());
  complete->set_cached_tokens(finish.cached_prompt_tokens());
  if (chunk.logprobs_size() > 0) FillLogprobs(chunk, complete->mutable_output_logprobs());
  TellPrompt(chunk, complete);
  complete->set_index(chunk.sample());
  if (finish.reason() == v1::FINISH_REASON_STOP_TOKEN) complete->set_matched_token_id(finish.stop_token_id());
  if (finish.reason() == v1::FINISH_REASON_STOP_STRING) complete->set_matched_stop_str(finish.stop_string());
}

}  // namespace dejavu
