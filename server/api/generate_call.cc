#include "server/api/generate_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/api/sparsity_messages.h"
#include "server/api/token_stream.h"
#include "server/rpc/error_details.h"
#include "server/rpc/gate.h"
#include "server/rpc/random.h"

namespace dejavu {
namespace {

// Of a prompt's tokens, so many can matter to the text that follows: those that hold bytes of its last character, and
// special tokens among them.
constexpr ptrdiff_t kPromptTail = 64;

// Log-probabilities of a prompt, alternatives counted, that a reply may tell on a thread that others wait for.
constexpr int64_t kFewScores = 1024;

// Below 2^32, so that every JSON client can hold it.
uint64_t DrawSeed() { return RandomBits() >> 32; }

// The server could; this tenant may not.
absl::Status CheckTenantTier(Tier tier, const TenantLimits& limits) {
  if (limits.Allows(tier)) return absl::OkStatus();
  return WithErrorInfo(
      absl::PermissionDeniedError(absl::StrCat("sparsity.tier is ", Name(tier), "; the tenant may use ",
                                               Name(limits.best()), " to ", Name(limits.worst()))),
      "TIER_NOT_ALLOWED");
}

// The prompt is computed once, however many samples it has.
int64_t MostTokens(const CheckedGenerate& checked) {
  return static_cast<int64_t>(checked.request.prompt.size()) +
         int64_t{checked.samples} * checked.request.max_new_tokens;
}

// The last character may be unfinished: then it is the output's.
void Echo(const std::vector<int32_t>& prompt, const Tokenizer* tokenizer, v1::PromptInfo* info) {
  info->mutable_token_ids()->Add(prompt.begin(), prompt.end());
  if (tokenizer == nullptr) return;
  Detokenizer detokenizer(*tokenizer, /*skip_special_tokens=*/true);
  for (const int32_t id : prompt) detokenizer.Append(id, info->mutable_text());
}

}  // namespace

absl::Status GenerateCall::Read(const Asking& asking, const grpc::ByteBuffer& bytes) {
  v1::GenerateRequest request;
  const absl::Status read = dialect_->Read(bytes, &request);
  if (read.ok() || !request.request_id().empty()) Note(request);
  RETURN_IF_ERROR(read);
  // The gate has seen the stream that carries it, perhaps long ago.
  if (asking.report != nullptr) RETURN_IF_ERROR(CheckPhase(state().phase(), Resource::kCapacity));
  absl::StatusOr<CheckedGenerate> checked = Check(&request, asking.rpc->tenant());
  if (!checked.ok()) return dialect_->Renamed(checked.status());
  NoteChecked(*checked);
  const Request& asked = checked->request;
  scores_much_ = asked.score && static_cast<int64_t>(asked.prompt.size()) * (1 + asked.score_top_logprobs) > kFewScores;
  if (dialect_->timeout() < SteadyTime::max() - asking.arrival) {
    checked->request.deadline = asking.arrival + dialect_->timeout();
  }
  std::vector<std::shared_ptr<ReplySink>> streams = MakeStreams(&*checked, asking);
  const int64_t tokens = MostTokens(*checked);
  return Submit({std::move(checked->request)}, tokens, std::move(streams), asking.rpc);
}

absl::StatusOr<CheckedGenerate> GenerateCall::Check(v1::GenerateRequest* request, const std::string& tenant) {
  const TenantLimits limits = state().LimitsOf(tenant);
  if (request->sparsity().tier() == v1::TIER_UNSPECIFIED) {
    request->mutable_sparsity()->set_tier(ToMessage(limits.Nearest(state().default_tier())));
  }
  ASSIGN_OR_RETURN(CheckedGenerate checked,
                   CheckGenerate(*request, state().options(), state().model(), DrawSeed(), dialect_->streams()));
  RETURN_IF_ERROR(CheckTenantTier(checked.request.sparsity.tier, limits));
  return checked;
}

void GenerateCall::NoteChecked(const CheckedGenerate& checked) {
  const Request& request = checked.request;
  asked().tier = request.sparsity.tier;
  asked().urgency = request.urgency;
  asked().samples = checked.samples;
  asked().asked_prompt_tokens = static_cast<int64_t>(request.prompt.size());
  asked().max_new_tokens = request.max_new_tokens;
  asked().seed = request.sampling.seed;
}

std::vector<std::shared_ptr<ReplySink>> GenerateCall::MakeStreams(CheckedGenerate* checked, const Asking& asking) {
  const Request& request = checked->request;
  TokenStreamOptions options;
  options.prompt.set_request_id(asked().request_id);
  options.prompt.set_model(state().model().name);
  options.prompt.set_prompt_tokens(static_cast<uint32_t>(request.prompt.size()));
  options.prompt.set_seed(request.sampling.seed);
  options.prompt.set_max_new_tokens(static_cast<uint32_t>(request.max_new_tokens));
  options.prompt.set_tier(ToMessage(request.sparsity.tier));
  if (checked->echo) Echo(request.prompt, state().model().tokenizer, &options.prompt);
  options.streaming = dialect_->streams();
  options.tokenizer = state().model().tokenizer;
  options.prompt_tail.assign(request.prompt.end() - std::min<ptrdiff_t>(kPromptTail, request.prompt.size()),
                             request.prompt.end());
  options.stop_strings = std::move(checked->stop_strings);
  options.special_stops = std::move(checked->special_stops);
  options.include_stop_string = checked->include_stop_string;
  options.min_new_tokens = request.min_new_tokens;
  options.max_outbox_bytes = state().options().max_outbox_bytes;
  options.arrival = asking.arrival;
  std::vector<std::shared_ptr<ReplySink>> streams;
  for (int i = 0; i < checked->samples; ++i) {
    options.sample = static_cast<uint32_t>(i);
    streams.push_back(std::make_shared<TokenStream>(options, [asking] { asking.Wake(); }));
    options.prompt.set_seed(options.prompt.seed() + 1);
    options.prompt.clear_text();  // the first tells it
    options.prompt.clear_token_ids();
  }
  return streams;
}

const google::protobuf::MessageLite* GenerateCall::NextReply(std::optional<absl::Status>* end) {
  while (true) {
    bool more = false;
    const google::protobuf::MessageLite* const reply = dialect_->Next(&more);
    if (!more) *end = end_;
    if (reply != nullptr || end_.has_value()) return reply;
    auto* const chunk = static_cast<v1::GenerateChunk*>(NextSinkReply(&end_));
    if (chunk != nullptr) dialect_->Take(chunk);
    if (chunk == nullptr && !end_.has_value()) return nullptr;
  }
}

void GenerateCall::ReleaseReply() {
  EngineCall::ReleaseReply();
  dialect_->Release();
}

}  // namespace dejavu
