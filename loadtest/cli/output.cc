#include "loadtest/cli/output.h"

#include <cstdio>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dejavu/rpc/status.pb.h"
#include "loadtest/client/status_code.h"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

// One google.rpc detail: for people and for programs.
struct Detail {
  std::string line;
  Json json;
};

void AppendBadRequest(const std::string& bytes, std::vector<Detail>* details) {
  rpc::BadRequest message;
  if (!message.ParseFromString(bytes)) return;
  for (const auto& violation : message.field_violations()) {
    details->push_back({absl::StrCat("field ", violation.field(), ": ", violation.description()),
                        {{"field", violation.field()}, {"description", violation.description()}}});
  }
}

void AppendRetryInfo(const std::string& bytes, std::vector<Detail>* details) {
  rpc::RetryInfo message;
  if (!message.ParseFromString(bytes)) return;
  const double seconds =
      static_cast<double>(message.retry_delay().seconds()) + 1e-9 * static_cast<double>(message.retry_delay().nanos());
  details->push_back({absl::StrCat("may be tried again after ", seconds, " s"), {{"retry_delay_s", seconds}}});
}

void AppendErrorInfo(const std::string& bytes, std::vector<Detail>* details) {
  rpc::ErrorInfo message;
  if (!message.ParseFromString(bytes)) return;
  Detail detail{absl::StrCat("reason ", message.reason()),
                {{"reason", message.reason()}, {"domain", message.domain()}}};
  for (const auto& [key, value] : message.metadata()) {
    absl::StrAppend(&detail.line, ", ", key, " ", value);
    detail.json["metadata"][key] = value;
  }
  details->push_back(std::move(detail));
}

void AppendQuotaFailure(const std::string& bytes, std::vector<Detail>* details) {
  rpc::QuotaFailure message;
  if (!message.ParseFromString(bytes)) return;
  for (const auto& violation : message.violations()) {
    details->push_back({absl::StrCat("limit of ", violation.subject(), ": ", violation.description()),
                        {{"subject", violation.subject()}, {"description", violation.description()}}});
  }
}

void AppendPreconditionFailure(const std::string& bytes, std::vector<Detail>* details) {
  rpc::PreconditionFailure message;
  if (!message.ParseFromString(bytes)) return;
  for (const auto& violation : message.violations()) {
    details->push_back(
        {absl::StrCat(violation.type(), " ", violation.subject(), ": ", violation.description()),
         {{"type", violation.type()}, {"subject", violation.subject()}, {"description", violation.description()}}});
  }
}

// The name of an enum's value as people write it: "EOS" of FINISH_REASON_EOS becomes "eos".
std::string ShortName(absl::string_view name, absl::string_view prefix) {
  return absl::AsciiStrToLower(absl::StartsWith(name, prefix) ? name.substr(prefix.size()) : "unknown");
}

std::vector<Detail> DetailsOf(const grpc::Status& status) {
  std::vector<Detail> details;
  rpc::Status message;
  if (!message.ParseFromString(status.error_details())) return details;
  for (const auto& any : message.details()) {
    if (absl::EndsWith(any.type_url(), "/google.rpc.BadRequest")) AppendBadRequest(any.value(), &details);
    if (absl::EndsWith(any.type_url(), "/google.rpc.RetryInfo")) AppendRetryInfo(any.value(), &details);
    if (absl::EndsWith(any.type_url(), "/google.rpc.ErrorInfo")) AppendErrorInfo(any.value(), &details);
    if (absl::EndsWith(any.type_url(), "/google.rpc.QuotaFailure")) AppendQuotaFailure(any.value(), &details);
    if (absl::EndsWith(any.type_url(), "/google.rpc.PreconditionFailure"))
      AppendPreconditionFailure(any.value(), &details);
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

std::string FinishReasonName(v1::FinishReason reason) {
  return ShortName(v1::FinishReason_Name(reason), "FINISH_REASON_");
}

std::string TierName(v1::Tier tier) { return ShortName(v1::Tier_Name(tier), "TIER_"); }

}  // namespace dejavu
