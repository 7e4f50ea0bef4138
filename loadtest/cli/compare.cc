// `dejavu-cli compare`: the same prompt in several tiers, text beside text, with speed, density and what shadow checks
// say. Every tier runs twice: once for its speed, and, where it is predicted, once with shadow checks, which take time.
#include <algorithm>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "loadtest/cli/commands.h"
#include "loadtest/cli/latency.h"
#include "loadtest/cli/output.h"
#include "loadtest/cli/prompt.h"
#include "loadtest/client/names.h"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kColumnWidth = 52;

struct Result {
  std::string tier;
  std::string text;
  std::vector<uint32_t> ids;
  double tokens_per_second = 0.0;
  double ms_per_token = 0.0;
  v1::SparsityReport sparsity;
};

size_t Width(absl::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// Whole words; only one that is longer than a line exceeds it.
std::vector<std::string> Wrapped(const std::string& text) {
  std::vector<std::string> lines;
  for (absl::string_view paragraph : absl::StrSplit(text, '\n')) {
    std::string line;
    for (absl::string_view word : absl::StrSplit(paragraph, ' ', absl::SkipEmpty())) {
      if (!line.empty() && Width(line) + 1 + Width(word) > kColumnWidth) {
        lines.push_back(std::move(line));
        line.clear();
      }
      absl::StrAppend(&line, line.empty() ? "" : " ", word);
    }
    lines.push_back(std::move(line));
  }
  return lines;
}

std::string Padded(const std::string& text) {
  const size_t width = Width(text);
  return absl::StrCat(text, std::string(width < kColumnWidth ? kColumnWidth - width : 0, ' '));
}

class CompareCommand : public Command {
 public:
  explicit CompareCommand(CLI::App* program)
      : Command(program->add_subcommand("compare", "The same prompt in several tiers, side by side")) {
    AddPromptFlags(app_, &prompt_, true);
    app_->add_option("--tiers", tiers_, "Which, such as dense,balanced")
        ->delimiter(',')
        ->allow_extra_args(false)
        ->check(CLI::IsMember(kTierNames))
        ->capture_default_str();
    app_->add_option("--max-new-tokens", max_new_tokens_, "New tokens")
        ->check(CLI::Range(1, 1000000))
        ->capture_default_str();
    app_->add_option("--temperature", temperature_, "0: always the most likely token")->capture_default_str();
    app_->add_option("--seed", seed_, "The same noise for all tiers")->capture_default_str();
    app_->add_option("--shadow-every", shadow_every_, "Compare one in so many tokens with the dense result; 0: none")
        ->capture_default_str();
    AddJsonFlag();
  }

  absl::Status Prepare() override { return ReadPrompt(&prompt_); }

  int Run(Connection* connection) override {
    std::vector<Result> results;
    for (const std::string& tier : tiers_) {
      Result result;
      result.tier = tier;
      grpc::Status status = Generate(connection, tier, 0, &result);
      if (status.ok() && shadow_every_ > 0 && tier != "dense" && tier != "exact") {
        Result checked;
        status = Generate(connection, tier, shadow_every_, &checked);
        *result.sparsity.mutable_shadow() = checked.sparsity.shadow();
      }
      if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
      results.push_back(std::move(result));
    }
    if (json_) {
      PrintJson(ToJson(results));
    } else {
      PrintTexts(results);
      PrintTable(results);
    }
    return kExitOk;
  }

 private:
  grpc::Status Generate(Connection* connection, const std::string& tier, uint32_t shadow_every, Result* result) {
    v1::GenerateRequest request;
    SetPrompt(prompt_, &request);
    request.mutable_sampling()->set_temperature(temperature_);
    request.mutable_sampling()->set_seed(seed_);
    request.mutable_stopping()->set_max_new_tokens(max_new_tokens_);
    request.mutable_sparsity()->set_tier(TierOf(tier).value_or(v1::TIER_UNSPECIFIED));
    request.mutable_sparsity()->set_shadow_every(shadow_every);
    return connection->Call([&](Attempt* attempt) {
      Latency latency(std::chrono::steady_clock::now());
      const auto reader = connection->generation().GenerateStream(&attempt->context, request);
      v1::GenerateChunk chunk;
      while (reader->Read(&chunk)) {
        attempt->answered = true;
        latency.AddTokens(chunk.token_ids_size(), std::chrono::steady_clock::now());
        result->text += chunk.text();
        result->ids.insert(result->ids.end(), chunk.token_ids().begin(), chunk.token_ids().end());
        if (chunk.has_finish()) result->sparsity = chunk.finish().sparsity();
      }
      // The mean: tokens that came in one message have no time between them, and with a fast model most have not.
      result->ms_per_token = latency.mean_gap_ms();
      result->tokens_per_second = result->ms_per_token > 0 ? 1000.0 / result->ms_per_token : 0.0;
      return reader->Finish();
    });
  }

  // How many tokens are the first one's before the first difference.
  static size_t SameTokens(const Result& a, const Result& b) {
    const auto [in_a, in_b] = std::mismatch(a.ids.begin(), a.ids.end(), b.ids.begin(), b.ids.end());
    return static_cast<size_t>(in_a - a.ids.begin());
  }

  static void PrintTexts(const std::vector<Result>& results) {
    std::vector<std::vector<std::string>> columns;
    size_t lines = 0;
    for (const Result& result : results) {
      columns.push_back(Wrapped(result.text));
      columns.back().insert(columns.back().begin(), {absl::AsciiStrToUpper(result.tier), ""});
      lines = std::max(lines, columns.back().size());
    }
    for (size_t i = 0; i < lines; ++i) {
      std::string line;
      for (const auto& column : columns) absl::StrAppend(&line, Padded(i < column.size() ? column[i] : ""), "  ");
      std::puts(std::string(absl::StripTrailingAsciiWhitespace(line)).c_str());
    }
    std::puts("");
  }

  static void PrintTable(const std::vector<Result>& results) {
    std::printf("%-10s %10s %10s %9s %8s %10s  %s\n", "tier", "tokens/s", "ms/token", "MLP rows", "heads", "as first",
                "shadow: same top token, KL");
    for (const Result& result : results) {
      const v1::SparsityReport& s = result.sparsity;
      std::printf("%-10s %10.1f %10.3f %8.1f%% %7.1f%% %10zu  ", result.tier.c_str(), result.tokens_per_second,
                  result.ms_per_token, 100.0 * s.mlp_density(), 100.0 * s.head_density(),
                  SameTokens(results.front(), result));
      if (s.shadow().tokens() == 0) {
        std::puts("-");
      } else {
        std::printf("%.1f %% of %u tokens, %.4f nats\n", 100.0 * s.shadow().top1_agreement(), s.shadow().tokens(),
                    s.shadow().kl_nats());
      }
    }
  }

  static Json ToJson(const std::vector<Result>& results) {
    Json tiers = Json::array();
    for (const Result& result : results) {
      const v1::SparsityReport& s = result.sparsity;
      tiers.push_back({{"tier", result.tier},
                       {"text", result.text},
                       {"token_ids", result.ids},
                       {"tokens_per_second", result.tokens_per_second},
                       {"mean_itl_ms", result.ms_per_token},
                       {"mlp_density", s.mlp_density()},
                       {"head_density", s.head_density()},
                       {"tokens_as_first", SameTokens(results.front(), result)},
                       {"shadow", s.shadow().tokens() > 0 ? dejavu::ToJson(s.shadow()) : Json()}});
    }
    return {{"tiers", std::move(tiers)}};
  }

  PromptSource prompt_;
  std::vector<std::string> tiers_ = {"dense", "balanced"};
  uint32_t max_new_tokens_ = 96, shadow_every_ = 4;
  float temperature_ = 0.0f;
  uint64_t seed_ = 7;
};

}  // namespace

std::unique_ptr<Command> MakeCompareCommand(CLI::App* program) { return std::make_unique<CompareCommand>(program); }

}  // namespace dejavu
