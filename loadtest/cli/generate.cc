// `dejavu-cli generate`: always over GenerateStream, because only a stream tells when each token came.
#include <algorithm>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "loadtest/cli/commands.h"
#include "loadtest/cli/latency.h"
#include "loadtest/cli/output.h"
#include "loadtest/cli/prompt.h"
#include "loadtest/client/names.h"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

// "ID:VALUE".
absl::StatusOr<std::pair<uint32_t, float>> ParseBias(const std::string& text) {
  const size_t colon = text.find(':');
  std::pair<uint32_t, float> bias;
  const absl::string_view view = text;
  if (colon == text.npos || !absl::SimpleAtoi(view.substr(0, colon), &bias.first) ||
      !absl::SimpleAtof(view.substr(colon + 1), &bias.second)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--logit-bias is \"", text, "\"; must be ID:VALUE, such as 50118:-5.5"));
  }
  return bias;
}

// Everything that one request brought, put together again from its chunks.
class Completion {
 public:
  explicit Completion(SteadyTime sent) : latency_(sent) {}

  void Add(const v1::GenerateChunk& chunk, SteadyTime arrived) {
    latency_.AddTokens(chunk.token_ids_size(), arrived);
    all_.MergeFrom(chunk);
    text_ += chunk.text();
  }

  const std::string& text() const { return text_; }
  const Latency& latency() const { return latency_; }
  const v1::PromptInfo& prompt() const { return all_.prompt(); }
  const v1::Finish& finish() const { return all_.finish(); }
  const v1::GenerateChunk& all() const { return all_; }  // its text is the last chunk's only

 private:
  Latency latency_;
  v1::GenerateChunk all_;
  std::string text_;
};

Json LogprobsJson(const v1::GenerateChunk& chunk) {
  Json logprobs = Json::array();
  for (int i = 0; i < chunk.logprobs_size(); ++i) {
    const v1::TokenLogprobs& token = chunk.logprobs(i);
    Json entry = {{"logprob", token.has_logprob() ? Json(token.logprob()) : Json()},
                  {"rank", token.rank()},
                  {"top", Json::array()}};
    for (const v1::TokenLogprob& alternative : token.top()) entry["top"].push_back(ToJson(alternative));
    logprobs.push_back(std::move(entry));
  }
  return logprobs;
}

void AddTokensJson(const v1::GenerateChunk& chunk, const std::string& text, Json* json) {
  (*json)["text"] = text;
  (*json)["token_ids"] = std::vector<uint32_t>(chunk.token_ids().begin(), chunk.token_ids().end());
  if (chunk.logprobs_size() > 0) (*json)["logprobs"] = LogprobsJson(chunk);
  if (chunk.prompt_logprobs_size() > 0) (*json)["prompt_logprobs"] = ToJson(chunk.prompt_logprobs());
}

void AddPromptJson(const v1::PromptInfo& prompt, Json* json) {
  (*json)["request_id"] = prompt.request_id();
  (*json)["model"] = prompt.model();
  (*json)["prompt_tokens"] = prompt.prompt_tokens();
  (*json)["seed"] = prompt.seed();
  (*json)["max_new_tokens"] = prompt.max_new_tokens();
  if (prompt.token_ids().empty()) return;
  (*json)["prompt"] = prompt.text();
  (*json)["prompt_token_ids"] = std::vector<uint32_t>(prompt.token_ids().begin(), prompt.token_ids().end());
}

void AddSparsityJson(const v1::SparsityReport& sparsity, Json* json) {
  (*json)["decode_tokens"] = sparsity.decode_tokens();
  (*json)["mlp_density"] = sparsity.mlp_density();
  (*json)["mlp_selected"] = sparsity.mlp_selected();
  (*json)["mlp_active"] = sparsity.mlp_active();
  (*json)["mlp_union_density"] = sparsity.mlp_union_density();
  (*json)["head_density"] = sparsity.head_density();
  (*json)["fallback_share"] = sparsity.fallback_share();
  (*json)["shadow"] = sparsity.shadow().tokens() > 0 ? ToJson(sparsity.shadow()) : Json();
}

void AddFinishJson(const Completion& completion, Json* json) {
  const v1::Finish& finish = completion.finish();
  const Latency& latency = completion.latency();
  (*json)["finish_reason"] = FinishReasonName(finish.reason());
  if (finish.matched_case() == v1::Finish::kStopString) (*json)["stop_string"] = finish.stop_string();
  if (finish.matched_case() == v1::Finish::kStopTokenId) (*json)["stop_token_id"] = finish.stop_token_id();
  (*json)["generated_tokens"] = finish.generated_tokens();
  (*json)["cached_prompt_tokens"] = finish.cached_prompt_tokens();
  (*json)["ttft_ms"] = latency.ttft_ms();
  (*json)["mean_itl_ms"] = latency.mean_gap_ms();
  (*json)["p50_itl_ms"] = latency.gap_ms(0.5);
  (*json)["p99_itl_ms"] = latency.gap_ms(0.99);
  (*json)["tokens_per_second"] = latency.tokens_per_second();
  (*json)["server_timings"] = ToJson(finish.timings());
  (*json)["tier"] = TierName(completion.prompt().tier());
  AddSparsityJson(finish.sparsity(), json);
  if (!finish.has_speculation()) return;
  const v1::SpeculationReport& speculation = finish.speculation();
  (*json)["speculation"] = {{"rounds", speculation.rounds()},
                            {"tokens", speculation.tokens()},
                            {"draft_tier", TierName(speculation.draft_tier())},
                            {"tier_drafted", speculation.tier().drafted()},
                            {"tier_accepted", speculation.tier().accepted()},
                            {"lookup_drafted", speculation.lookup().drafted()},
                            {"lookup_accepted", speculation.lookup().accepted()}};
}

void PrintChunkJson(const v1::GenerateChunk& chunk, const Completion& completion, bool name_sample) {
  Json json;
  if (name_sample) json["sample"] = chunk.sample();
  if (chunk.has_prompt()) AddPromptJson(chunk.prompt(), &json);
  AddTokensJson(chunk, chunk.text(), &json);
  if (chunk.has_finish()) AddFinishJson(completion, &json);
  PrintJson(json);
}

void PrintStats(const Completion& completion) {
  const Latency& latency = completion.latency();
  std::fprintf(stderr,
               "\ntime to first token  %.2f ms\n"
               "per token            mean %.2f ms, p50 %.2f ms, p99 %.2f ms\n"
               "tokens               %u in the prompt, %d new, %.1f per second\n"
               "finish               %s (seed %llu)\n",
               latency.ttft_ms(), latency.mean_gap_ms(), latency.gap_ms(0.5), latency.gap_ms(0.99),
               completion.prompt().prompt_tokens(), latency.tokens(), latency.tokens_per_second(),
               FinishReasonName(completion.finish().reason()).c_str(),
               static_cast<unsigned long long>(completion.prompt().seed()));
}

void PrintSparsity(const Completion& completion) {
  const v1::SparsityReport& sparsity = completion.finish().sparsity();
  std::fprintf(stderr, "sparsity             tier %s, %.1f %% of MLP rows and %.1f %% of heads",
               TierName(completion.prompt().tier()).c_str(), 100 * sparsity.mlp_density(),
               100 * sparsity.head_density());
  const v1::ShadowReport& shadow = sparsity.shadow();
  if (shadow.tokens() > 0) {
    std::fprintf(stderr, "; same most likely token as dense in %.1f %% of %u tokens", 100 * shadow.top1_agreement(),
                 shadow.tokens());
  }
  std::fputs("\n", stderr);
  if (!completion.finish().has_speculation()) return;
  const v1::SpeculationReport& speculation = completion.finish().speculation();
  std::fprintf(
      stderr, "speculation          %llu checks gave %llu tokens; right: %llu of %llu drafts, %llu of %llu looked up\n",
      static_cast<unsigned long long>(speculation.rounds()), static_cast<unsigned long long>(speculation.tokens()),
      static_cast<unsigned long long>(speculation.tier().accepted()),
      static_cast<unsigned long long>(speculation.tier().drafted()),
      static_cast<unsigned long long>(speculation.lookup().accepted()),
      static_cast<unsigned long long>(speculation.lookup().drafted()));
}

class GenerateCommand : public Command {
 public:
  explicit GenerateCommand(CLI::App* program)
      : Command(program->add_subcommand("generate", "Continue a prompt; the text is written as it comes")) {
    AddPromptFlags(app_, &prompt_, true);
    AddRequestFlags();
    AddSamplingFlags();
    AddStoppingFlags();
    AddSparsityFlags();
    AddSchedulingFlags();
    app_->add_flag("--stats", stats_,
                   "Write latencies, tokens per second, the finish reason and the sparsity to stderr")
        ->group("Output");
    CLI::Option* json = app_->add_flag("--json", json_, "Write one JSON object instead of the text")->group("Output");
    app_->add_flag("--stream", stream_, "With --json: one object per chunk, the last with finish_reason and the stats")
        ->group("Output");
    app_->add_flag("--logprobs", logprobs_, "Log-probability and rank of every token")->needs(json)->group("Output");
    app_->add_option("--top-logprobs", top_logprobs_, "And that many alternatives")->needs(json)->group("Output");
    app_->add_flag("--echo", echo_, "Write the prompt, too, as the server has it, before what follows it")
        ->group("Output");
    app_->add_flag("--prompt-logprobs", prompt_logprobs_, "Log-probability and rank of every token of the prompt")
        ->needs(json)
        ->group("Output");
    app_->add_option("--prompt-top-logprobs", prompt_top_logprobs_, "And that many alternatives")
        ->needs(json)
        ->group("Output");
  }

  absl::Status Prepare() override {
    RETURN_IF_ERROR(CheckUtf8("--model", model_));
    RETURN_IF_ERROR(CheckUtf8("--request-id", request_id_));
    for (const std::string& stop : stop_strings_) RETURN_IF_ERROR(CheckUtf8("--stop", stop));
    for (const std::string& text : logit_bias_) {
      ASSIGN_OR_RETURN(const auto bias, ParseBias(text));
      (*request_.mutable_penalties()->mutable_logit_bias())[bias.first] = bias.second;
    }
    RETURN_IF_ERROR(ReadPrompt(&prompt_));
    FillRequest();
    return absl::OkStatus();
  }

  int Run(Connection* connection) override {
    std::vector<Completion> samples;
    const grpc::Status status = connection->Call([&](Attempt* attempt) {
      samples = std::vector<Completion>(std::max<uint32_t>(1, samples_), Completion(std::chrono::steady_clock::now()));
      return Receive(connection, attempt, &samples);
    });
    if (!json_ && samples.size() == 1) EndLine(samples[0].prompt().text() + samples[0].text());
    std::fflush(stdout);
    if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
    if (json_ && !stream_) PrintWhole(samples);
    if (stats_) {
      for (const Completion& sample : samples) {
        PrintStats(sample);
        PrintSparsity(sample);
      }
    }
    return kExitOk;
  }

 private:
  void AddRequestFlags() {
    app_->add_option("--model", model_, "Name of the model; without it, whichever is served");
    app_->add_option("--request-id", request_id_, "Id of the request, for `abort`; without it, the server makes one");
  }

  void AddSamplingFlags() {
    const auto add = [&](const char* name, auto& value, const char* help) {
      return app_->add_option(name, value, help)->group("Sampling");
    };
    add("--temperature", temperature_, "0, the default: always the most likely token");
    add("--top-k", top_k_, "Only the K most likely tokens");
    add("--top-p", top_p_, "Only the most likely tokens that together reach P");
    add("--min-p", min_p_, "Only tokens with at least P times the probability of the best");
    add("--seed", seed_, "The same seed gives the same tokens; without one, the server draws it");
    add("--samples", samples_, "So many completions of the prompt, each written when it has ended");
    add("--repetition-penalty", repetition_, "Above 1: discourage what prompt and output hold");
    add("--presence-penalty", presence_, "Subtracted from the logits of tokens in the output");
    add("--frequency-penalty", frequency_, "The same, for each time that they occur");
    add("--logit-bias", logit_bias_, "ID:VALUE, added to the logit of a token; may be repeated")
        ->allow_extra_args(false);
    add("--allowed-token-ids", allowed_token_ids_, "Only these, such as 5,7")->delimiter(',')->allow_extra_args(false);
  }

  void AddStoppingFlags() {
    const auto add = [&](const char* name, auto& value, const char* help) {
      return app_->add_option(name, value, help)->group("Stopping");
    };
    add("--max-new-tokens", max_new_tokens_, "Most new tokens; without it, the server's default; 0: the prompt alone");
    add("--min-new-tokens", min_new_tokens_, "Neither an end nor a stop token before that many");
    add("--stop", stop_strings_, "Text at which to stop; may be repeated")->allow_extra_args(false);
    add("--stop-token-ids", stop_token_ids_, "Tokens at which to stop, such as 5,7")
        ->delimiter(',')
        ->allow_extra_args(false);
    app_->add_flag("--include-stop-string", include_stop_string_, "Leave the stop string in the text")
        ->group("Stopping");
    app_->add_flag("--ignore-eos", ignore_eos_, "Go on after the end token")->group("Stopping");
  }

  void AddSparsityFlags() {
    app_->add_option("--tier", tier_, "Quality for speed; without it, the server's default")
        ->check(CLI::IsMember(kTierNames))
        ->group("Sparsity");
    app_->add_flag("--deterministic", deterministic_, "In a predicted tier: the same tokens beside any other requests")
        ->group("Sparsity");
    app_->add_option("--shadow-every", shadow_every_,
                     "In a predicted tier: compare one in so many tokens with the dense result; 0: none")
        ->group("Sparsity");
    app_->add_option("--speculation", speculation_,
                     "Guess tokens and check them together; the same tokens, at other times")
        ->check(CLI::IsMember(kSpeculationNames))
        ->group("Sparsity");
    app_->add_option("--draft-tier", draft_tier_, "Who guesses")
        ->check(CLI::IsMember({"high", "balanced", "fast"}))
        ->group("Sparsity");
    app_->add_option("--draft-tokens", draft_tokens_, "Most tokens guessed at once")->group("Sparsity");
  }

  void AddSchedulingFlags() {
    const auto add = [&](const char* name, auto& value, const char* help) {
      return app_->add_option(name, value, help)->group("Scheduling");
    };
    add("--urgency", urgency_, "Who goes first; without it, normal")->check(CLI::IsMember(kUrgencyNames));
    add("--priority", priority_, "Higher first, among the tenant's own requests of one urgency");
    add("--tenant", tenant_, "Whose request it is");
    add("--inter-token-target-ms", inter_token_target_ms_, "Wanted between two tokens");
    add("--max-time-s", max_time_s_, "End with what there is by then");
    add("--cache-salt", cache_salt_, "Share prefixes with requests of this salt only");
  }

  void FillRequest() {
    request_.set_model(model_);
    request_.set_request_id(request_id_);
    SetPrompt(prompt_, &request_);
    FillSampling();
    FillStopping();
    FillSparsity();
    FillScheduling();
    v1::Output& output = *request_.mutable_output();
    output.set_logprobs(logprobs_);
    output.set_top_logprobs(top_logprobs_);
    output.set_echo(echo_);
    output.set_prompt_logprobs(prompt_logprobs_);
    output.set_prompt_top_logprobs(prompt_top_logprobs_);
  }

  void FillSampling() {
    v1::Sampling& sampling = *request_.mutable_sampling();
    if (temperature_) sampling.set_temperature(*temperature_);
    if (top_k_) sampling.set_top_k(*top_k_);
    if (top_p_) sampling.set_top_p(*top_p_);
    if (min_p_) sampling.set_min_p(*min_p_);
    if (seed_) sampling.set_seed(*seed_);
    sampling.set_samples(samples_);
    v1::Penalties& penalties = *request_.mutable_penalties();
    if (repetition_) penalties.set_repetition(*repetition_);
    if (presence_) penalties.set_presence(*presence_);
    if (frequency_) penalties.set_frequency(*frequency_);
    penalties.mutable_allowed_token_ids()->Add(allowed_token_ids_.begin(), allowed_token_ids_.end());
  }

  void FillStopping() {
    v1::Stopping& stopping = *request_.mutable_stopping();
    if (max_new_tokens_) stopping.set_max_new_tokens(*max_new_tokens_);
    stopping.set_min_new_tokens(min_new_tokens_);
    stopping.mutable_stop_strings()->Add(stop_strings_.begin(), stop_strings_.end());
    stopping.mutable_stop_token_ids()->Add(stop_token_ids_.begin(), stop_token_ids_.end());
    stopping.set_include_stop_string(include_stop_string_);
    stopping.set_ignore_eos(ignore_eos_);
    if (max_time_s_) stopping.set_max_time_s(*max_time_s_);
  }

  void FillSparsity() {
    v1::Sparsity& sparsity = *request_.mutable_sparsity();
    sparsity.set_tier(TierOf(tier_).value_or(v1::TIER_UNSPECIFIED));
    sparsity.set_deterministic(deterministic_);
    if (shadow_every_) sparsity.set_shadow_every(*shadow_every_);
    v1::Speculation& speculation = *request_.mutable_speculation();
    speculation.set_mode(SpeculationModeOf(speculation_).value_or(v1::SPECULATION_MODE_UNSPECIFIED));
    speculation.set_draft_tier(TierOf(draft_tier_).value_or(v1::TIER_UNSPECIFIED));
    if (draft_tokens_) speculation.set_most_tokens(*draft_tokens_);
  }

  void FillScheduling() {
    v1::Scheduling& scheduling = *request_.mutable_scheduling();
    scheduling.set_urgency(UrgencyOf(urgency_).value_or(v1::URGENCY_UNSPECIFIED));
    scheduling.set_priority(priority_);
    if (inter_token_target_ms_) scheduling.set_inter_token_target_ms(*inter_token_target_ms_);
    scheduling.set_cache_salt(cache_salt_);
  }

  grpc::Status Receive(Connection* connection, Attempt* attempt, std::vector<Completion>* samples) {
    if (!tenant_.empty()) attempt->context.AddMetadata("x-tenant", tenant_);
    const auto reader = connection->generation().GenerateStream(&attempt->context, request_);
    v1::GenerateChunk chunk;
    while (reader->Read(&chunk)) {
      attempt->answered = true;
      if (chunk.sample() >= samples->size()) continue;  // nobody asked for it
      Completion& sample = (*samples)[chunk.sample()];
      sample.Add(chunk, std::chrono::steady_clock::now());
      if (json_) {
        if (stream_) PrintChunkJson(chunk, sample, samples->size() > 1);
      } else if (samples->size() > 1) {
        // Side by side they could not be read.
        if (!chunk.has_finish()) continue;
        const std::string text = samples->front().prompt().text() + sample.text();
        std::printf("--- sample %u, seed %llu\n%s", chunk.sample(),
                    static_cast<unsigned long long>(sample.prompt().seed()), text.c_str());
        EndLine(text);
      } else {
        Write(chunk.prompt().text());
        Write(chunk.text());
      }
    }
    return reader->Finish();
  }

  // One object, or with several samples one that holds an object for each.
  void PrintWhole(const std::vector<Completion>& samples) const {
    Json all = Json::array();
    for (const Completion& sample : samples) {
      Json json;
      AddPromptJson(sample.prompt(), &json);
      AddTokensJson(sample.all(), sample.text(), &json);
      AddFinishJson(sample, &json);
      all.push_back(std::move(json));
    }
    PrintJson(samples.size() == 1 ? all[0] : Json{{"samples", std::move(all)}});
  }

  static void Write(const std::string& text) {
    if (text.empty()) return;
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }

  // Like a shell command, end on a line of its own, whatever the text ended with.
  static void EndLine(const std::string& text) {
    if (!text.empty() && text.back() != '\n') std::puts("");
    std::fflush(stdout);
  }

  PromptSource prompt_;
  std::string model_, request_id_, tier_, urgency_, tenant_, cache_salt_;
  int32_t priority_ = 0;
  std::optional<float> inter_token_target_ms_, max_time_s_;
  std::optional<float> temperature_, top_p_, min_p_, repetition_, presence_, frequency_;
  std::optional<uint32_t> top_k_, max_new_tokens_, shadow_every_, draft_tokens_;
  std::string speculation_, draft_tier_;
  std::optional<uint64_t> seed_;
  std::vector<std::string> logit_bias_, stop_strings_;
  std::vector<uint32_t> allowed_token_ids_, stop_token_ids_;
  uint32_t min_new_tokens_ = 0, top_logprobs_ = 0, prompt_top_logprobs_ = 0, samples_ = 0;
  bool echo_ = false, prompt_logprobs_ = false;
  bool include_stop_string_ = false, ignore_eos_ = false, logprobs_ = false;
  bool deterministic_ = false;
  bool stats_ = false, stream_ = false;
  v1::GenerateRequest request_;
};

}  // namespace

std::unique_ptr<Command> MakeGenerateCommand(CLI::App* program) { return std::make_unique<GenerateCommand>(program); }

}  // namespace dejavu
