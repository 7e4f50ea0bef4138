// dejavu-sim: what a server with given costs does with given arrivals, on a virtual clock.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <random>
#include <sstream>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/sim/simulator.h"

namespace dejavu {
namespace {

constexpr char kTraceHeader[] = "arrival_s,prompt_tokens,output_tokens,urgency,tenant,tier,deadline_s";

struct Arguments {
  SimOptions sim;
  std::string trace;
  double rate = 0.0, seconds = 3600.0, burstiness = 1.0;
  int64_t requests = 0;
  double prompt_tokens = 256, output_tokens = 64, spread = 0.5;
  double deadline_s = 0.0;
  uint64_t seed = 1;
  std::string tier = "dense";
  std::vector<std::string> mix, tenants;
  bool no_prefix_cache = false;
};

// "name=number".
std::vector<std::pair<std::string, double>> Parse(const char* flag, const std::vector<std::string>& entries) {
  std::vector<std::pair<std::string, double>> parsed;
  for (const std::string& entry : entries) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(entry, absl::MaxSplits('=', 1));
    double value = 0.0;
    if (parts.first.empty() || !absl::SimpleAtod(parts.second, &value) || !(value >= 0.0 && value <= 1e9)) {
      throw CLI::ValidationError(flag, absl::StrCat("'", entry, "' is not NAME=NUMBER"));
    }
    parsed.emplace_back(parts.first, value);
  }
  return parsed;
}

Urgency ParseUrgency(const std::string& name) {
  for (int u = 0; u < kUrgencies; ++u) {
    if (name == Name(static_cast<Urgency>(u))) return static_cast<Urgency>(u);
  }
  throw CLI::ValidationError("urgency", absl::StrCat("'", name, "' is not interactive, normal or batch"));
}

Tier TierOf(const std::string& name) {
  const std::optional<Tier> tier = ParseTier(name);
  if (!tier.has_value()) throw CLI::ValidationError("tier", absl::StrCat("'", name, "' is not a tier"));
  return *tier;
}

// Gamma gaps (burstiness 1: Poisson) and log-normal lengths.
class Arrivals {
 public:
  explicit Arrivals(const Arguments& arguments)
      : a_(arguments), random_(arguments.seed), tier_(TierOf(arguments.tier)) {
    for (const auto& [name, share] : Parse("--mix", a_.mix)) mix_.emplace_back(ParseUrgency(name), share);
    if (mix_.empty()) mix_.emplace_back(Urgency::kNormal, 1.0);
    tenants_ = Parse("--tenant", a_.tenants);
    if (tenants_.empty()) tenants_.emplace_back("", 1.0);
  }

  std::optional<SimRequest> Next() {
    const double shape = 1.0 / (a_.burstiness * a_.burstiness);
    now_s_ += std::gamma_distribution<double>(shape, 1.0 / (a_.rate * shape))(random_);
    if (a_.requests > 0 ? made_ >= a_.requests : now_s_ > a_.seconds) return std::nullopt;
    ++made_;
    SimRequest r;
    r.arrival_s = now_s_;
    r.prompt_tokens = Length(a_.prompt_tokens, a_.sim.context / 2);
    r.output_tokens = r.max_new_tokens = Length(a_.output_tokens, a_.sim.context - r.prompt_tokens);
    r.urgency = Draw(mix_);
    r.tenant = Draw(tenants_);
    r.tier = tier_;
    r.deadline_s = a_.deadline_s;
    return r;
  }

 private:
  int32_t Length(double mean, int32_t most) {
    const double sigma = a_.spread, mu = std::log(mean) - sigma * sigma / 2.0;
    return static_cast<int32_t>(std::clamp(std::lognormal_distribution<double>(mu, sigma)(random_), 1.0, double(most)));
  }
  template <typename T>
  T Draw(const std::vector<std::pair<T, double>>& shares) {
    double total = 0.0;
    for (const auto& share : shares) total += share.second;
    double at = std::uniform_real_distribution<double>(0.0, total)(random_);
    for (const auto& share : shares) {
      if ((at -= share.second) <= 0.0) return share.first;
    }
    return shares.back().first;
  }

  const Arguments& a_;
  std::mt19937_64 random_;
  const Tier tier_;
  std::vector<std::pair<Urgency, double>> mix_;
  std::vector<std::pair<std::string, double>> tenants_;
  double now_s_ = 0.0;
  int64_t made_ = 0;
};

// Rows in order of arrival.
class Trace {
 public:
  explicit Trace(const std::string& path) : path_(path), in_(path) {
    std::string header;
    if (!in_) throw CLI::FileError(absl::StrCat("cannot read ", path));
    if (!std::getline(in_, header) || header != kTraceHeader) {
      throw CLI::FileError(absl::StrCat(path, ": the first line must be ", kTraceHeader));
    }
  }
  std::optional<SimRequest> Next() {
    std::string line;
    if (!std::getline(in_, line)) return std::nullopt;
    ++line_;
    const std::vector<std::string> cells = absl::StrSplit(line, ',');
    SimRequest r;
    if (cells.size() != 7 || !absl::SimpleAtod(cells[0], &r.arrival_s) ||
        !absl::SimpleAtoi(cells[1], &r.prompt_tokens) || !absl::SimpleAtoi(cells[2], &r.output_tokens) ||
        (!cells[6].empty() && !absl::SimpleAtod(cells[6], &r.deadline_s)) || r.prompt_tokens < 1 ||
        r.output_tokens < 1 || !(r.arrival_s >= last_s_)) {
      throw CLI::FileError(
          absl::StrCat(path_, ":", line_, ": '", line, "' is not a row of ", kTraceHeader, " in order of arrival"));
    }
    last_s_ = r.arrival_s;
    r.max_new_tokens = r.output_tokens;
    r.urgency = cells[3].empty() ? Urgency::kNormal : ParseUrgency(cells[3]);
    r.tenant = cells[4];
    r.tier = cells[5].empty() ? Tier::kDense : TierOf(cells[5]);
    return r;
  }

 private:
  const std::string path_;
  std::ifstream in_;
  int64_t line_ = 1;
  double last_s_ = 0.0;
};

void PrintHistogram(const char* name, const Histogram& h) {
  absl::PrintF("  %-22s %10.2f %10.2f %10.2f %10.2f %10.2f\n", name, h.mean(), h.Quantile(0.5), h.Quantile(0.9),
               h.Quantile(0.99), h.most());
}

void Print(const SimResult& r, const SimOptions& options) {
  absl::PrintF("%.1f s of virtual time, %d steps\n\n", r.seconds, r.steps);
  absl::PrintF("received %d = finished %d + refused %d + cancelled %d + failed %d + live %d\n", r.account.received,
               r.account.finished, r.account.refused_total(), r.account.cancelled, r.account.failed, r.account.live);
  for (int i = 0; i < kRefusals; ++i) {
    if (r.account.refused[i] > 0)
      absl::PrintF("  refused, %s: %d\n", Name(static_cast<Refusal>(i)), r.account.refused[i]);
  }
  absl::PrintF("goodput %.3f requests/s\n\n  %-22s %10s %10s %10s %10s %10s\n", r.goodput_per_s(), "ms", "mean", "p50",
               "p90", "p99", "most");
  for (int u = 0; u < kUrgencies; ++u) {
    const SimClass& of = r.of_urgency[u];
    if (of.ttft_ms.count() == 0) continue;
    absl::PrintF("%s: %d finished, %d good\n", Name(static_cast<Urgency>(u)), of.finished, of.good);
    PrintHistogram("queue", of.queue_ms);
    PrintHistogram("time to first token", of.ttft_ms);
    PrintHistogram("between tokens", of.inter_token_ms);
  }
  absl::PrintF(
      "\nlongest wait %.2f s, at most %d waiting; at most %d of %d KV blocks; %d prompt tokens from the prefix "
      "cache, %d preemptions\n",
      r.longest_queue_age_s, r.most_waiting, r.most_kv_blocks, options.kv_blocks, r.cached_prompt_tokens,
      r.preemptions);
  if (r.tenants.size() < 2) return;
  int64_t total = 0;
  for (const auto& [name, served] : r.tenants) total += served.prompt_tokens + served.output_tokens;
  for (const auto& [name, served] : r.tenants) {
    const int64_t tokens = served.prompt_tokens + served.output_tokens;
    absl::PrintF("tenant %s: %d tokens, %.1f %%\n", name, tokens,
                 100.0 * static_cast<double>(tokens) / std::max<double>(1.0, static_cast<double>(total)));
  }
}

int Run(int argc, char** argv) {
  Arguments a;
  CLI::App app{"What a dejavud server with given step costs does with given arrivals, on a virtual clock.",
               "dejavu-sim"};
  app.add_option("--trace", a.trace, absl::StrCat("CSV of arrivals: ", kTraceHeader));
  app.add_option("--rate", a.rate, "requests per second to generate, where there is no trace")
      ->check(CLI::Range(1e-6, 1e6));
  app.add_option("--seconds", a.seconds, "of arrivals")->capture_default_str();
  app.add_option("--requests", a.requests, "this many instead");
  app.add_option("--burstiness", a.burstiness, "coefficient of variation of the gaps; 1: Poisson")
      ->capture_default_str()
      ->check(CLI::Range(0.01, 100.0));
  app.add_option("--prompt-tokens", a.prompt_tokens, "mean")->capture_default_str()->check(CLI::Range(1.0, 1e6));
  app.add_option("--output-tokens", a.output_tokens, "mean")->capture_default_str()->check(CLI::Range(1.0, 1e6));
  app.add_option("--spread", a.spread, "sigma of the log-normal lengths")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 3.0));
  app.add_option("--deadline-s", a.deadline_s, "of each request; 0: none")->capture_default_str();
  app.add_option("--tier", a.tier, "of each request")->capture_default_str();
  app.add_option("--mix", a.mix, "shares of urgencies, such as interactive=1 batch=3");
  app.add_option("--tenant", a.tenants, "shares of the arrivals, such as a=1 b=1");
  app.add_option("--seed", a.seed, "of the arrivals")->capture_default_str();

  SimOptions& s = a.sim;
  std::vector<std::string> weights;
  app.add_option("--dense-ms", s.costs.dense_ms, "a dense step by itself")->default_val("10");
  app.add_option("--exact-ms", s.costs.exact_ms, "an EXACT step")->default_val("8");
  app.add_option("--predicted-ms", s.costs.predicted_ms, "a step of a predicted tier")->default_val("5");
  app.add_option("--row-ms", s.costs.row_ms, "more for each row that decodes")->default_val("0.1");
  app.add_option("--prefill-token-ms", s.costs.prefill_token_ms, "more for each prompt token")->default_val("0.2");
  app.add_option("--context-token-ms", s.costs.context_token_ms, "more for each token of context")
      ->default_val("0.0001");
  app.add_option("--max-batch", s.scheduler.max_batch, "sequences at once")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  app.add_option("--max-step-tokens", s.scheduler.max_step_tokens, "of one step")->capture_default_str();
  app.add_option("--prefill-chunk-tokens", s.scheduler.prefill_chunk_tokens, "of one sequence in a step")
      ->capture_default_str();
  app.add_option("--max-waiting-requests", s.admission.max_waiting_requests, "in the queue")->capture_default_str();
  app.add_option("--max-waiting-tokens", s.admission.max_waiting_tokens, "of their prompts; 0: no limit")
      ->capture_default_str();
  app.add_option("--deadline-slack", s.admission.deadline_slack, "see dejavud --help")->capture_default_str();
  app.add_option("--tenant-weight", weights, "such as a=1 b=3");
  app.add_option("--ageing-s", s.scheduler.ageing_s, "see dejavud --help")->capture_default_str();
  app.add_option("--prefill-share", s.scheduler.prefill_share, "see dejavud --help")->capture_default_str();
  app.add_option("--step-target-ms", s.scheduler.inter_token_target_ms, "between two tokens; 0: by --prefill-share")
      ->capture_default_str();
  app.add_flag("--overcommit", s.scheduler.overcommit, "of KV blocks");
  app.add_flag("--no-prefix-cache", a.no_prefix_cache, "share no prefixes");
  app.add_option("--kv-blocks", s.kv_blocks, "in all")->capture_default_str()->check(CLI::Range(1, 1 << 24));
  app.add_option("--block-tokens", s.block_tokens, "of one")->capture_default_str()->check(CLI::Range(1, 4096));
  app.add_option("--context", s.context, "of the model")->capture_default_str()->check(CLI::Range(2, 1 << 20));
  app.add_option("--ttft-target-ms", s.ttft_target_ms, "of goodput; 0: any")->capture_default_str();
  app.add_option("--inter-token-target-ms", s.inter_token_target_ms, "of goodput; 0: any")->capture_default_str();
  try {
    app.parse(argc, argv);
    if (a.trace.empty() == (a.rate <= 0.0)) throw CLI::ValidationError("--rate", "give either --rate or --trace");
    if (s.kv_blocks * s.block_tokens < s.context) {
      throw CLI::ValidationError("--kv-blocks",
                                 absl::StrCat("is ", s.kv_blocks, "; one sequence of ", s.context, " tokens needs ",
                                              (s.context + s.block_tokens - 1) / s.block_tokens));
    }
    s.scheduler.max_step_tokens = std::max(s.scheduler.max_step_tokens, s.scheduler.max_batch);
    s.scheduler.tenant_weights = absl::StrJoin(weights, ",");
    if (const absl::Status checked = ParseTenantWeights(s.scheduler.tenant_weights).status(); !checked.ok()) {
      throw CLI::ValidationError("--tenant-weight", std::string(checked.message()));
    }
    s.prefix_cache = !a.no_prefix_cache;
    const auto progress = [](double seconds) { std::fprintf(stderr, "\rdejavu-sim: %.0f s of virtual time", seconds); };
    SimResult result;
    if (a.trace.empty()) {
      Arrivals arrivals(a);
      result = Simulate(
          s, [&] { return arrivals.Next(); }, progress);
    } else {
      Trace trace(a.trace);
      result = Simulate(
          s, [&] { return trace.Next(); }, progress);
    }
    std::fprintf(stderr, "\n");
    Print(result, s);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const CLI::Error& error) {
    std::fprintf(stderr, "dejavu-sim: %s\n", error.what());
    return 2;
  }
}

}  // namespace
}  // namespace dejavu

int main(int argc, char** argv) { return dejavu::Run(argc, argv); }
