// dejavu-sim: what a server with given costs does with given arrivals, on a virtual clock.
#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/sim/arrivals.h"
#include "engine/sim/simulator.h"
#include "kernels/base/end_output.h"

namespace dejavu {
namespace {

struct Arguments {
  SimOptions sim;
  std::string trace;  // empty: `arrivals`
  SimArrivalOptions arrivals;
  std::vector<std::string> tenant_weights;  // "NAME=WEIGHT"
  bool no_prefix_cache = false;
};

void PrintQuantiles(const char* name, const QuantileCounter& h) {
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
    PrintQuantiles("queue", of.queue_ms);
    PrintQuantiles("time to first token", of.ttft_ms);
    PrintQuantiles("between tokens", of.inter_token_ms);
  }
  absl::PrintF(
      "\nlongest wait %.2f s, at most %d waiting; at most %d of %d KV blocks; %d prompt tokens from the prefix "
      "cache, %d preemptions\n",
      r.longest_queue_age_s, r.most_waiting, r.most_kv_blocks, options.kv_blocks, r.cached_prompt_tokens,
      r.preemptions);
  if (const SpeculationTotals& s = r.speculation; s.rounds > 0) {
    absl::PrintF("speculation: %d rounds of %.2f tokens; %.1f s in the place of %.1f s\n", s.rounds,
                 static_cast<double>(s.tokens) / static_cast<double>(s.rounds), s.spent_ms / 1e3, s.plain_ms / 1e3);
  }
  if (r.tenants.size() < 2) return;
  int64_t total = 0;
  for (const auto& [name, served] : r.tenants) total += served.prompt_tokens + served.output_tokens;
  for (const auto& [name, served] : r.tenants) {
    const int64_t tokens = served.prompt_tokens + served.output_tokens;
    absl::PrintF("tenant %s: %d tokens, %.1f %%\n", name, tokens,
                 100.0 * static_cast<double>(tokens) / std::max<double>(1.0, static_cast<double>(total)));
  }
}

void AddArrivals(CLI::App* app, std::string* trace, SimArrivalOptions* options) {
  app->add_option("--trace", *trace, absl::StrCat("CSV of arrivals: ", kTraceHeader));
  app->add_option("--rate", options->rate, "requests per second to generate, where there is no trace")
      ->check(CLI::Range(1e-6, 1e6));
  app->add_option("--seconds", options->seconds, "of arrivals")->capture_default_str();
  app->add_option("--requests", options->requests, "this many instead");
  app->add_option("--burstiness", options->burstiness, "coefficient of variation of the gaps; 1: Poisson")
      ->capture_default_str()
      ->check(CLI::Range(0.01, 100.0));
  app->add_option("--prompt-tokens", options->prompt_tokens, "mean")
      ->capture_default_str()
      ->check(CLI::Range(1.0, 1e6));
  app->add_option("--output-tokens", options->output_tokens, "mean")
      ->capture_default_str()
      ->check(CLI::Range(1.0, 1e6));
  app->add_option("--spread", options->spread, "sigma of the log-normal lengths")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 3.0));
  app->add_option("--deadline-s", options->deadline_s, "of each request; 0: none")->capture_default_str();
  app->add_option("--tier", options->tier, "of each request")->capture_default_str();
  app->add_option("--mix", options->mix, "shares of urgencies, such as interactive=1 batch=3");
  app->add_option("--tenant", options->tenants, "shares of the arrivals, such as a=1 b=1");
  app->add_option("--seed", options->seed, "of the arrivals")->capture_default_str();
}

void AddCosts(CLI::App* app, CostParameters* costs) {
  app->add_option("--dense-ms", costs->dense_ms, "a dense step by itself")->default_val("10");
  app->add_option("--exact-ms", costs->exact_ms, "an EXACT step")->default_val("8");
  app->add_option("--predicted-ms", costs->predicted_ms, "a step of a predicted tier")->default_val("5");
  app->add_option("--row-ms", costs->row_ms, "more for each row that decodes")->default_val("0.1");
  app->add_option("--prefill-token-ms", costs->prefill_token_ms, "more for each prompt token")->default_val("0.2");
  app->add_option("--context-token-ms", costs->context_token_ms, "more for each token of context")
      ->default_val("0.0001");
  app->add_option("--check-row-ms", costs->check_row_ms, "more for each draft that is checked")->default_val("0.1");
  app->add_option("--draft-ms", costs->draft_ms, "a step that drafts; default: as --predicted-ms");
}

void AddSpeculation(CLI::App* app, SimOptions* options) {
  const std::map<std::string, SpeculationMode> modes = {
      {"off", SpeculationMode::kOff}, {"auto", SpeculationMode::kAuto}, {"always", SpeculationMode::kAlways}};
  app->add_option("--speculation", options->speculation.mode, "of each request that is DENSE or EXACT; default: off")
      ->transform(CLI::CheckedTransformer(modes));
  app->add_option("--draft-tokens", options->speculation.most_tokens, "in a round")
      ->capture_default_str()
      ->check(CLI::Range(1, kMostDraftTokens));
  app->add_option("--draft-acceptance", options->draft_acceptance, "share of the drafts that are right")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
}

void AddScheduling(CLI::App* app, SimOptions* options, std::vector<std::string>* tenant_weights) {
  app->add_option("--max-batch", options->scheduler.max_batch, "sequences at once")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  app->add_option("--max-step-tokens", options->scheduler.max_step_tokens, "of one step")->capture_default_str();
  app->add_option("--prefill-chunk-tokens", options->scheduler.prefill_chunk_tokens, "of one sequence in a step")
      ->capture_default_str();
  app->add_option("--max-waiting-requests", options->admission.max_waiting_requests, "in the queue")
      ->capture_default_str();
  app->add_option("--max-waiting-tokens", options->admission.max_waiting_tokens, "of their prompts; 0: no limit")
      ->capture_default_str();
  app->add_option("--deadline-slack", options->admission.deadline_slack, "see dejavud --help")->capture_default_str();
  app->add_option("--tenant-weight", *tenant_weights, "such as a=1 b=3");
  app->add_option("--ageing-s", options->scheduler.ageing_s, "see dejavud --help")->capture_default_str();
  app->add_option("--prefill-share", options->scheduler.prefill_share, "see dejavud --help")->capture_default_str();
  app->add_option("--step-target-ms", options->scheduler.inter_token_target_ms,
                  "between two tokens; 0: by --prefill-share")
      ->capture_default_str();
}

void AddMemoryAndTargets(CLI::App* app, SimOptions* options, bool* no_prefix_cache) {
  app->add_flag("--overcommit", options->scheduler.overcommit, "of KV blocks");
  app->add_flag("--no-prefix-cache", *no_prefix_cache, "share no prefixes");
  app->add_option("--kv-blocks", options->kv_blocks, "in all")->capture_default_str()->check(CLI::Range(1, 1 << 24));
  app->add_option("--block-tokens", options->block_tokens, "of one")->capture_default_str()->check(CLI::Range(1, 4096));
  app->add_option("--context", options->context, "of the model")->capture_default_str()->check(CLI::Range(2, 1 << 20));
  app->add_option("--ttft-target-ms", options->ttft_target_ms, "of goodput; 0: any")->capture_default_str();
  app->add_option("--inter-token-target-ms", options->inter_token_target_ms, "of goodput; 0: any")
      ->capture_default_str();
}

// Checks what no option has wrong by itself, and completes the simulation's options.
void Complete(Arguments* arguments) {
  SimOptions& sim = arguments->sim;
  if (arguments->trace.empty() == (arguments->arrivals.rate <= 0.0)) {
    throw CLI::ValidationError("--rate", "give either --rate or --trace");
  }
  if (sim.kv_blocks * sim.block_tokens < sim.context) {
    throw CLI::ValidationError("--kv-blocks",
                               absl::StrCat("is ", sim.kv_blocks, "; one sequence of ", sim.context, " tokens needs ",
                                            (sim.context + sim.block_tokens - 1) / sim.block_tokens));
  }
  sim.scheduler.max_step_tokens = std::max(sim.scheduler.max_step_tokens, sim.scheduler.max_batch);
  sim.scheduler.tenant_weights = absl::StrJoin(arguments->tenant_weights, ",");
  if (const absl::Status checked = ParseTenantWeights(sim.scheduler.tenant_weights).status(); !checked.ok()) {
    throw CLI::ValidationError("--tenant-weight", std::string(checked.message()));
  }
  sim.prefix_cache = !arguments->no_prefix_cache;
}

SimResult Simulated(const Arguments& arguments) {
  const SimOptions& sim = arguments.sim;
  const auto progress = [](double seconds) { std::fprintf(stderr, "\rdejavu-sim: %.0f s of virtual time", seconds); };
  if (!arguments.trace.empty()) {
    TraceArrivals trace(arguments.trace);
    return Simulate(
        sim, [&] { return trace.Next(); }, progress);
  }
  DrawnArrivals drawn(arguments.arrivals, sim.context);
  return Simulate(
      sim, [&] { return drawn.Next(); }, progress);
}

int Main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app{"What a dejavud server with given step costs does with given arrivals, on a virtual clock.",
               "dejavu-sim"};
  AddArrivals(&app, &arguments.trace, &arguments.arrivals);
  AddCosts(&app, &arguments.sim.costs);
  AddSpeculation(&app, &arguments.sim);
  AddScheduling(&app, &arguments.sim, &arguments.tenant_weights);
  AddMemoryAndTargets(&app, &arguments.sim, &arguments.no_prefix_cache);
  try {
    app.parse(argc, argv);
    Complete(&arguments);
    const SimResult result = Simulated(arguments);
    std::fprintf(stderr, "\n");
    Print(result, arguments.sim);
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

int main(int argc, char** argv) { return dejavu::EndOutput("dejavu-sim", dejavu::Main(argc, argv)); }
