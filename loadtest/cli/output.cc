#include "loadtest/cli/output.h"

#include <cstdio>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dejavu/rpc/status.pb.h"
#include "loadtest/client/names.h"
#include "loadtest/client/status_code.h"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

// One google.rpc detail: for people and for programs.
struct Detail {
  std::string line;
  Json json;
};

// `key` is what the violation is about, which `words` name to people.
Detail Violation(const char* words, const char* key, const std::string& value, const std::string& description) {
  return {absl::StrCat(words, value, ": ", description), {{key, value}, {"description", description}}};
}

void Append(const rpc::BadRequest& message, std::vector<Detail>* details) {
  for (const auto& v : message.field_violations()) {
    details->push_back(Violation("field ", "field", v.field(), v.description()));
  }
}

void Append(const rpc::RetryInfo& message, std::vector<Detail>* details) {
  const double seconds =
      static_cast<double>(message.retry_delay().seconds()) + 1e-9 * static_cast<double>(message.retry_delay().nanos());
  details->push_back({absl::StrCat("may be tried again after ", seconds, " s"), {{"retry_delay_s", seconds}}});
}

void Append(const rpc::ErrorInfo& message, std::vector<Detail>* details) {
  Detail detail{absl::StrCat("reason ", message.reason()),
                {{"reason", message.reason()}, {"domain", message.domain()}}};
  for (const auto& [key, value] : message.metadata()) {
    absl::StrAppend(&detail.line, ", ", key, " ", value);
    detail.json["metadata"][key] = value;
  }
  details->push_back(std::move(detail));
}

void Append(const rpc::QuotaFailure& message, std::vector<Detail>* details) {
  for (const auto& v : message.violations()) {
    details->push_back(Violation("limit of ", "subject", v.subject(), v.description()));
  }
}

void Append(const rpc::PreconditionFailure& message, std::vector<Detail>* details) {
  for (const auto& v : message.violations()) {
    details->push_back({absl::StrCat(v.type(), " ", v.subject(), ": ", v.description()),
                        {{"type", v.type()}, {"subject", v.subject()}, {"description", v.description()}}});
  }
}

// Where `any` holds the google.rpc message of that name, and it can be read.
template <typename Message>
void AppendIf(const char* name, const google::protobuf::Any& any, std::vector<Detail>* details) {
  Message message;
  if (!absl::EndsWith(any.type_url(), absl::StrCat("/google.rpc.", name))) return;
  if (message.ParseFromString(any.value())) Append(message, details);
}

std::vector<Detail> DetailsOf(const grpc::Status& status) {
  std::vector<Detail> details;
  rpc::Status message;
  if (!message.ParseFromString(status.error_details())) return details;
  for (const auto& any : message.details()) {
    AppendIf<rpc::BadRequest>("BadRequest", any, &details);
    AppendIf<rpc::RetryInfo>("RetryInfo", any, &details);
    AppendIf<rpc::ErrorInfo>("ErrorInfo", any, &details);
    AppendIf<rpc::QuotaFailure>("QuotaFailure", any, &details);
    AppendIf<rpc::PreconditionFailure>("PreconditionFailure", any, &details);
  }
  return details;
}

}  // namespace

void PrintJson(const Json& json) {
  std::puts(json.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
  std::fflush(stdout);
}

int ReportFailure(const grpc::Status& status, bool interrupted, bool json) {
  const std::vector<Detail> details = DetailsOf(status);
  if (json) {
    Json error = {
        {"code", CodeName(status.error_code())}, {"message", status.error_message()}, {"details", Json::array()}};
    for (const Detail& detail : details) error["details"].push_back(detail.json);
    PrintJson({{"error", error}});
  }
  if (interrupted) {
    std::fputs("dejavu-cli: interrupted\n", stderr);
    return kExitInterrupted;
  }
  std::fprintf(stderr, "dejavu-cli: %s: %s\n", CodeName(status.error_code()), status.error_message().c_str());
  for (const Detail& detail : details) std::fprintf(stderr, "  %s\n", detail.line.c_str());
  if (status.error_code() == grpc::StatusCode::UNAVAILABLE) return kExitUnavailable;
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) return kExitDeadline;
  return kExitFailed;
}

Json ToJson(const v1::Timings& timings) {
  return {{"queue_ms", timings.queue_ms()},
          {"ttft_ms", timings.ttft_ms()},
          {"mean_itl_ms", timings.mean_itl_ms()},
          {"total_ms", timings.total_ms()}};
}

Json ToJson(const v1::TokenLogprob& alternative) {
  return {{"id", alternative.id()}, {"logprob", alternative.logprob()}};
}

Json ToJson(const google::protobuf::RepeatedPtrField<v1::ScoredToken>& prompt) {
  Json tokens = Json::array();
  for (const v1::ScoredToken& token : prompt) {
    Json entry = {{"id", token.id()},
                  {"logprob", token.has_logprob() ? Json(token.logprob()) : Json()},
                  {"rank", token.has_logprob() ? Json(token.rank()) : Json()},
                  {"top", Json::array()}};
    for (const v1::TokenLogprob& alternative : token.top()) entry["top"].push_back(ToJson(alternative));
    tokens.push_back(std::move(entry));
  }
  return tokens;
}

Json ToJson(const v1::ShadowReport& shadow) {
  return {{"tokens", shadow.tokens()},       {"top1_agreement", shadow.top1_agreement()},
          {"kl_nats", shadow.kl_nats()},     {"recall", shadow.recall()},
          {"precision", shadow.precision()}, {"missed_mass", shadow.missed_mass()}};
}

Json ToJson(const v1::SparsityInfo& sparsity) {
  Json available = Json::array(), exact = Json::array();
  for (const int tier : sparsity.available_tiers()) available.push_back(TierName(static_cast<v1::Tier>(tier)));
  for (const auto& layer : sparsity.exact_layers()) {
    exact.push_back({{"tier", TierName(layer.tier())}, {"layer", layer.layer()}});
  }
  return {{"default_tier", TierName(sparsity.default_tier())},
          {"highest_tier", TierName(sparsity.highest_tier())},
          {"lowest_tier", TierName(sparsity.lowest_tier())},
          {"available_tiers", std::move(available)},
          {"predictor", sparsity.predictor()},
          {"predictor_tap", sparsity.predictor_tap()},
          {"predictor_bytes", sparsity.predictor_bytes()},
          {"shadow_every", sparsity.shadow_every()},
          {"shadow_tokens", sparsity.shadow_tokens()},
          {"shadow_top1_agreement", sparsity.shadow_top1_agreement()},
          {"shadow_kl_nats", sparsity.shadow_kl_nats()},
          {"exact_layers", std::move(exact)},
          {"fallbacks", sparsity.fallbacks()},
          {"recoveries", sparsity.recoveries()}};
}

std::string StateName(v1::ServerState state) { return v1::ServerState_Name(state).substr(sizeof "SERVER_STATE_" - 1); }

}  // namespace dejavu
