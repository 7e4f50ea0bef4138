#include "server/api/kserve_dialect.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"
#include "nlohmann/json.hpp"
#include "server/api/kserve_tensors.h"
#include "server/api/sampling_parameters.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"
#include "server/rpc/random.h"

namespace dejavu {
namespace {

using inference::InferParameter;

constexpr KServeTensor kInputs[] = {{"text_input", inference::TYPE_STRING, 1, true},
                                    {"input_ids", inference::TYPE_INT32, -1, true},
                                    {"stream", inference::TYPE_BOOL, 1, true},
                                    {"sampling_parameters", inference::TYPE_STRING, 1, true},
                                    {"exclude_input_in_output", inference::TYPE_BOOL, 1, true},
                                    {"return_finish_reason", inference::TYPE_BOOL, 1, true},
                                    {"return_cumulative_logprob", inference::TYPE_BOOL, 1, true},
                                    {"return_logprobs", inference::TYPE_BOOL, 1, true},
                                    {"return_num_input_tokens", inference::TYPE_BOOL, 1, true},
                                    {"return_num_output_tokens", inference::TYPE_BOOL, 1, true}};
constexpr KServeTensor kOutputs[] = {
    {"text_output", inference::TYPE_STRING, -1, false},       {"output_ids", inference::TYPE_INT32, -1, false},
    {"finish_reason", inference::TYPE_STRING, -1, false},     {"cumulative_logprob", inference::TYPE_FP32, -1, false},
    {"logprobs", inference::TYPE_STRING, -1, false},          {"num_input_tokens", inference::TYPE_UINT32, 1, false},
    {"num_output_tokens", inference::TYPE_UINT32, -1, false}, {"prompt_logprobs", inference::TYPE_STRING, 1, false},
};

// About what a token's log-probability takes as JSON.
constexpr int64_t kLogprobTextBytes = 80;

// Of a reply in a stream, which is made beside those of all other calls.
constexpr int64_t kMostStreamLogprobs = 4096;

// Each reply holds the id.
constexpr size_t kMostIdBytes = 1 << 10;

// So that logs and Abort can name a request by what its client calls it, though clients use ids again as they like.
std::string RequestId(const std::string& id) {
  if (id.empty() || id.size() > 100 || !CheckRequestId(id).ok()) return absl::StrCat("req-", RandomHex(16));
  return absl::StrCat(id, "-", RandomHex(8));
}

nlohmann::json ToJson(const InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case InferParameter::kBoolParam:
      return parameter.bool_param();
    case InferParameter::kInt64Param:
      return parameter.int64_param();
    case InferParameter::kStringParam:
      return parameter.string_param();
    case InferParameter::kDoubleParam:
      return parameter.double_param();
    case InferParameter::kUint64Param:
      return parameter.uint64_param();
    case InferParameter::PARAMETER_CHOICE_NOT_SET:
      break;
  }
  return nullptr;
}

absl::StatusOr<SteadyTime::duration> ReadTimeout(const InferParameter& parameter) {
  int64_t us = -1;
  if (parameter.has_int64_param()) us = parameter.int64_param();
  if (parameter.has_uint64_param()) us = static_cast<int64_t>(std::min<uint64_t>(parameter.uint64_param(), INT64_MAX));
  if (us < 0) return InvalidField("timeout", "must be a whole number of microseconds, 0 for none");
  return us == 0 ? SteadyTime::duration::max() : Lasting(1e-6 * static_cast<double>(us));
}

absl::string_view ReasonText(const v1::GenerateChunk& chunk) {
  if (!chunk.has_finish()) return "None";
  return chunk.finish().reason() == v1::FINISH_REASON_LENGTH ? "length" : "stop";
}

}  // namespace

absl::Status CheckKServeVersion(const std::string& version) {
  if (version.empty() || version == kKServeVersion) return absl::OkStatus();
  int64_t number = 0;
  if (!absl::SimpleAtoi(version, &number)) {
    return InvalidField("model_version", absl::StrCat("is ", Printable(version), "; it must be a number"));
  }
  return absl::NotFoundError(absl::StrCat("the model has no version ", number, "; ", kKServeVersion, " is served"));
}

absl::Span<const KServeTensor> KServeInputs() { return kInputs; }
absl::Span<const KServeTensor> KServeOutputs() { return kOutputs; }

const char* KServeTypeName(inference::DataType type) {
  switch (type) {
    case inference::TYPE_BOOL:
      return "BOOL";
    case inference::TYPE_UINT32:
      return "UINT32";
    case inference::TYPE_INT32:
      return "INT32";
    case inference::TYPE_FP32:
      return "FP32";
    default:
      return "BYTES";
  }
}

absl::Status KServeDialect::Read(const grpc::ByteBuffer& bytes, v1::GenerateRequest* request) {
  inference::ModelInferRequest infer;
  RETURN_IF_ERROR(ParseMessage(bytes, &infer));
  request->set_request_id(RequestId(infer.id()));
  request->set_model(infer.model_name());
  if (infer.id().size() > kMostIdBytes) {
    return InvalidField("id",
                        absl::StrCat("has ", infer.id().size(), " bytes; at most ", kMostIdBytes, " are allowed"));
  }
  id_ = infer.id();
  RETURN_IF_ERROR(CheckModelName(infer.model_name(), model_));
  RETURN_IF_ERROR(CheckKServeVersion(infer.model_version()));
  RETURN_IF_ERROR(ReadTensors(infer, request));
  RETURN_IF_ERROR(ReadOutputs(infer));
  RETURN_IF_ERROR(CheckLogprobs(*request));
  if (asked_.output_ids && request->sampling().samples() > 1) {
    return InvalidField("output_ids",
                        "is asked for, and the samples' ids are of different lengths: ask for one sample");
  }
  gathered_.Expect(std::max(1u, request->sampling().samples()));
  return absl::OkStatus();
}

absl::Status KServeDialect::ReadTensors(const inference::ModelInferRequest& infer, v1::GenerateRequest* request) {
  SetVllmDefaults(request);
  ASSIGN_OR_RETURN(const std::vector<KServeInput> inputs, PairInputs(infer));
  std::optional<bool> exclude_input;
  std::array<bool, std::size(kInputs)> seen = {};
  bool has_sampling = false;
  for (const KServeInput& input : inputs) {
    const std::string& name = input.tensor->name();
    const auto known =
        std::find_if(std::begin(kInputs), std::end(kInputs), [&](const auto& t) { return name == t.name; });
    if (known == std::end(kInputs))
      return InvalidField("inputs", absl::StrCat("has ", Printable(name), ", which is no input of this model"));
    if (std::exchange(seen[static_cast<size_t>(known - std::begin(kInputs))], true))
      return InvalidField(name, "is given twice");
    if (name == "text_input") {
      ASSIGN_OR_RETURN(*request->mutable_text(), BytesOf(input));
      if (!IsValidUtf8(request->text())) return InvalidField(name, "is not valid UTF-8");
    } else if (name == "input_ids") {
      ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, IdsOf(input));
      if (request->has_text()) return InvalidField(name, "is given beside text_input");
      request->mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
    } else if (name == "sampling_parameters") {
      has_sampling = true;
      ASSIGN_OR_RETURN(const std::string text, BytesOf(input));
      RETURN_IF_ERROR(ReadSamplingText(text, request));
    } else {
      ASSIGN_OR_RETURN(const bool flag, FlagOf(input));
      if (name == "stream") stream_ = flag;
      if (name == "exclude_input_in_output") exclude_input = flag;
      if (name == "return_finish_reason") asked_.finish_reason = flag;
      if (name == "return_cumulative_logprob") asked_.cumulative_logprob = flag;
      if (name == "return_logprobs") asked_.logprobs = flag;
      if (name == "return_num_input_tokens") asked_.num_input_tokens = flag;
      if (name == "return_num_output_tokens") asked_.num_output_tokens = flag;
    }
  }
  if (seen[0] && seen[1]) return InvalidField("text_input", "is given beside input_ids");
  RETURN_IF_ERROR(ReadParameters(infer, has_sampling, request));
  return CheckCombination(exclude_input, request);
}

absl::Status KServeDialect::CheckCombination(const std::optional<bool>& exclude_input, v1::GenerateRequest* request) {
  if (stream_ && !in_stream_) {
    return InvalidField("stream", "is true, and ModelInfer has one reply: use ModelStreamInfer");
  }
  const uint32_t samples = request->sampling().samples();
  if (stream_ && samples > 1) return InvalidField("n", absl::StrCat("is ", samples, "; a stream has one sample"));
  const bool by_ids = request->has_token_ids();
  const bool exclude = exclude_input.value_or(stream_ || by_ids);
  if (!exclude && stream_) return InvalidField("exclude_input_in_output", "is false; a stream has the output alone");
  request->mutable_output()->set_echo(!exclude && by_ids);
  if (!exclude && !by_ids) prepended_ = request->text();
  if (asked_.cumulative_logprob || asked_.logprobs) {
    logprobs_asked_ = request->output().logprobs();
    request->mutable_output()->set_logprobs(true);
  }
  asked_.prompt_logprobs = request->output().prompt_logprobs();
  return absl::OkStatus();
}

// In doubles: nothing has checked the counts yet, and their product may be beyond 64 bits.
absl::Status KServeDialect::CheckLogprobs(const v1::GenerateRequest& request) const {
  const double most = in_stream_ ? kMostStreamLogprobs : kMaxReplyBytes / kLogprobTextBytes;
  const char* const instead = in_stream_ ? " can be sent here: stream, or use ModelInfer" : " can be sent";
  double entries = 0.0;
  if (!stream_ && asked_.logprobs && logprobs_asked_) {
    const double samples = std::max(1u, request.sampling().samples());
    entries = samples * request.stopping().max_new_tokens() * (1.0 + request.output().top_logprobs());
  }
  if (entries > most) {
    return InvalidField("logprobs",
                        absl::StrCat("makes a reply of about ", entries, " entries; at most ", most, instead));
  }
  if (!asked_.prompt_logprobs) return absl::OkStatus();
  // A text has no more tokens than bytes, but for what stands around it.
  const double given = request.has_text() ? 2.0 + static_cast<double>(request.text().size())
                                          : static_cast<double>(request.token_ids().ids_size());
  const double kept = request.truncate_prompt_tokens() > 0 ? request.truncate_prompt_tokens() : model_.context;
  entries += std::min(given, kept) * (1.0 + request.output().prompt_top_logprobs());
  if (entries <= most) return absl::OkStatus();
  return InvalidField("prompt_logprobs",
                      absl::StrCat("makes a reply of up to ", entries, " entries; at most ", most, instead));
}

absl::Status KServeDialect::ReadOutputs(const inference::ModelInferRequest& infer) {
  if (infer.outputs().empty()) return absl::OkStatus();
  const auto told = [&](absl::string_view name) {
    return std::any_of(infer.outputs().begin(), infer.outputs().end(),
                       [&](const auto& output) { return output.name() == name; });
  };
  for (const auto& output : infer.outputs()) {
    const std::string& name = output.name();
    const auto known =
        std::find_if(std::begin(kOutputs), std::end(kOutputs), [&](const auto& t) { return name == t.name; });
    if (known == std::end(kOutputs)) {
      return InvalidField("outputs", absl::StrCat("has ", Printable(name), ", which is no output of this model"));
    }
    if (!output.parameters().empty()) {
      return InvalidField(name, absl::StrCat("has the parameter ", Printable(output.parameters().begin()->first),
                                             "; none is served here, shared memory neither"));
    }
  }
  // A client that names it wants it, and nothing else. Log-probabilities cost more: without their flags they are left
  // out, as Triton's backend does it; perf_analyzer names all outputs that there are.
  asked_.text_output = told("text_output");
  asked_.output_ids = told("output_ids");
  asked_.finish_reason = told("finish_reason");
  asked_.num_input_tokens = told("num_input_tokens");
  asked_.num_output_tokens = told("num_output_tokens");
  asked_.logprobs = asked_.logprobs && told("logprobs");
  asked_.cumulative_logprob = asked_.cumulative_logprob && told("cumulative_logprob");
  asked_.prompt_logprobs = asked_.prompt_logprobs && told("prompt_logprobs");
  return absl::OkStatus();
}

// Sampling parameters may stand there, too, where there is no tensor of them.
absl::Status KServeDialect::ReadParameters(const inference::ModelInferRequest& infer, bool has_sampling_tensor,
                                           v1::GenerateRequest* request) {
  nlohmann::json sampling = nlohmann::json::object();
  for (const auto& [name, parameter] : infer.parameters()) {
    if (name == "timeout") {
      ASSIGN_OR_RETURN(timeout_, ReadTimeout(parameter));
    } else if (name == "triton_enable_empty_final_response") {
      // The last reply of a stream is never empty, and says that it is the last.
      if (!parameter.has_bool_param()) return InvalidField(name, "must be true or false");
    } else if (name == "priority" || name == "sequence_id" || name == "sequence_start" || name == "sequence_end") {
      const bool none = ToJson(parameter) == 0 || ToJson(parameter) == false;
      if (!none) return InvalidField(name, "is not served here");
    } else if (has_sampling_tensor) {
      return InvalidField(Printable(name), "is no parameter that is known here beside the tensor sampling_parameters");
    } else {
      sampling[name] = ToJson(parameter);
    }
  }
  return ReadSamplingParameters(sampling, request);
}

absl::Status KServeDialect::Renamed(absl::Status status) const {
  static constexpr FieldName kNames[] = {{"text", "text_input"}};
  return WithFieldNames(WithFieldNames(std::move(status), VllmNames()), kNames);
}

void KServeDialect::Take(v1::GenerateChunk* chunk) {
  if (chunk->has_prompt()) prompt_tokens_ = chunk->prompt().prompt_tokens();
  if (chunk->has_prompt() && !chunk->prompt().text().empty()) prepended_ = chunk->prompt().text();
  prompt_.MergeFrom(chunk->prompt_logprobs());
  if (stream_) {
    // The first one tells of the prompt alone, and what is held back has no token.
    if (chunk->token_ids_size() > 0 || chunk->has_finish()) chunk_ = chunk;
    return;
  }
  gathered_.Take(chunk);
}

const google::protobuf::MessageLite* KServeDialect::Next(bool* more) {
  *more = false;
  std::vector<v1::GenerateChunk*> samples;
  if (stream_) {
    if (chunk_ == nullptr) return nullptr;
    samples.push_back(std::exchange(chunk_, nullptr));
  } else {
    std::vector<v1::GenerateChunk>* const chunks = gathered_.All();
    if (chunks == nullptr) return nullptr;
    for (v1::GenerateChunk& chunk : *chunks) samples.push_back(&chunk);
  }
  inference::ModelInferResponse* const infer = Fill(samples, samples[0]->has_finish());
  if (in_stream_) return &response_;
  return infer;
}

// Assigned anew: Clear would keep the memory.
void KServeDialect::Release() {
  prepended_ = std::string();
  prompt_ = {};
  gathered_.Release();
  response_ = inference::ModelStreamInferResponse();
}

inference::ModelInferResponse* KServeDialect::Fill(const std::vector<v1::GenerateChunk*>& samples, bool last) {
  response_.Clear();
  inference::ModelInferResponse* const infer = response_.mutable_infer_response();
  infer->set_model_name(model_.name);
  infer->set_model_version(kKServeVersion);
  infer->set_id(id_);
  if (in_stream_) (*infer->mutable_parameters())["triton_final_response"].set_bool_param(last);
  std::string text, ids, reasons, cumulative, logprobs, counts;
  int64_t id_count = 0;
  for (const v1::GenerateChunk* chunk : samples) {
    AppendBytes(absl::StrCat(prepended_, chunk->text()), &text);
    for (const uint32_t id : chunk->token_ids()) AppendNumber(static_cast<int32_t>(id), &ids);
    id_count += chunk->token_ids_size();
    AppendBytes(ReasonText(*chunk), &reasons);
    if (!stream_) cumulative_logprob_ = 0.0;  // of each sample; a stream has one
    for (const v1::TokenLogprobs& logprob : chunk->logprobs()) cumulative_logprob_ += logprob.logprob();
    AppendNumber(static_cast<float>(cumulative_logprob_), &cumulative);
    if (asked_.logprobs) AppendBytes(logprobs_asked_ ? LogprobsText(*chunk) : "null", &logprobs);
    AppendNumber(static_cast<uint32_t>(chunk->token_ids_size()), &counts);
  }
  const auto rows = static_cast<int64_t>(samples.size());
  if (asked_.text_output) AddOutput("text_output", "BYTES", rows, std::move(text), infer);
  if (asked_.output_ids) AddOutput("output_ids", "INT32", id_count, std::move(ids), infer);
  if (asked_.finish_reason) AddOutput("finish_reason", "BYTES", rows, std::move(reasons), infer);
  if (asked_.cumulative_logprob) AddOutput("cumulative_logprob", "FP32", rows, std::move(cumulative), infer);
  if (asked_.logprobs) AddOutput("logprobs", "BYTES", rows, std::move(logprobs), infer);
  if (asked_.num_input_tokens) {
    std::string tokens;
    AppendNumber(prompt_tokens_, &tokens);
    AddOutput("num_input_tokens", "UINT32", 1, std::move(tokens), infer);
  }
  if (asked_.prompt_logprobs && !prompt_.empty()) {
    std::string told;
    AppendBytes(PromptLogprobsText(), &told);
    AddOutput("prompt_logprobs", "BYTES", 1, std::move(told), infer);
    prompt_.Clear();  // of a stream, the first reply has it
  }
  if (asked_.num_output_tokens) AddOutput("num_output_tokens", "UINT32", rows, std::move(counts), infer);
  return infer;
}

// The token's own entry and its alternatives, by id.
nlohmann::json KServeDialect::LogprobsOf(uint32_t id, float logprob, uint32_t rank, const Alternatives& top) const {
  const auto entry = [&](uint32_t of, float its, uint32_t at) {
    nlohmann::json made = {{"logprob", its}, {"rank", at}, {"decoded_token", nullptr}};
    if (model_.tokenizer != nullptr)
      made["decoded_token"] = model_.tokenizer->Decode({static_cast<int32_t>(of)}, false);
    return made;
  };
  nlohmann::json token = nlohmann::json::object();
  for (int k = 0; k < top.size(); ++k) {
    token[std::to_string(top[k].id())] = entry(top[k].id(), top[k].logprob(), static_cast<uint32_t>(k + 1));
  }
  token[std::to_string(id)] = entry(id, logprob, rank);
  return token;
}

// A list with an object for each token.
std::string KServeDialect::LogprobsText(const v1::GenerateChunk& chunk) const {
  nlohmann::json tokens = nlohmann::json::array();
  for (int i = 0; i < chunk.logprobs_size(); ++i) {
    const v1::TokenLogprobs& logprobs = chunk.logprobs(i);
    tokens.push_back(LogprobsOf(chunk.token_ids(i), logprobs.logprob(), logprobs.rank(), logprobs.top()));
  }
  return tokens.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// Likewise, null for the first. Alternatives are those to the token, where ours are those to what follows it.
std::string KServeDialect::PromptLogprobsText() const {
  nlohmann::json tokens = nlohmann::json::array({nullptr});
  for (int i = 1; i < prompt_.size(); ++i) {
    tokens.push_back(LogprobsOf(prompt_[i].id(), prompt_[i].logprob(), prompt_[i].rank(), prompt_[i - 1].top()));
  }
  return tokens.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

inference::ModelStreamInferResponse KServeDialect::ErrorReply(const absl::Status& status) const {
  inference::ModelStreamInferResponse reply;
  reply.set_error_message(ToGrpcStatus(status).error_message());
  reply.mutable_infer_response()->set_id(id_);
  reply.mutable_infer_response()->set_model_name(model_.name);
  return reply;
}

}  // namespace dejavu
