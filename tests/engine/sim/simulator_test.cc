#include "engine/sim/simulator.h"

#include <random>

#include "gtest/gtest.h"

namespace dejavu {
namespace {

SimOptions Options() {
  SimOptions options;
  options.costs.dense_ms = options.costs.exact_ms = options.costs.predicted_ms = 10.0;
  options.costs.row_ms = 0.2;
  options.costs.prefill_token_ms = 0.2;
  options.costs.context_token_ms = 1e-4;
  options.ttft_target_ms = 2000.0;
  return options;
}

// Poisson arrivals of prompts of 128 tokens and outputs of 64.
std::function<std::optional<SimRequest>()> Poisson(
    double rate, double seconds, uint64_t seed, std::function<void(SimRequest*, std::mt19937_64&)> change = nullptr) {
  return [=, random = std::mt19937_64(seed), now_s = 0.0]() mutable -> std::optional<SimRequest> {
    now_s += std::exponential_distribution<double>(rate)(random);
    if (now_s > seconds) return std::nullopt;
    SimRequest r;
    r.arrival_s = now_s;
    r.prompt_tokens = 128;
    r.output_tokens = r.max_new_tokens = 64;
    if (change != nullptr) change(&r, random);
    return r;
  };
}

void ExpectBooksBalanced(const SimResult& r) {
  const Account& a = r.account;
  EXPECT_EQ(a.live, 0);
  EXPECT_EQ(a.received, a.finished + a.refused_total() + a.cancelled + a.failed);
}

TEST(Simulator, RunsOneRequestInTheTimeThatItsStepsTake) {
  SimOptions options = Options();
  bool given = false;
  const SimResult r = Simulate(options, [&]() -> std::optional<SimRequest> {
    if (given) return std::nullopt;
    given = true;
    SimRequest request;
    request.arrival_s = 5.0;
    request.prompt_tokens = 64;
    request.output_tokens = request.max_new_tokens = 3;
    return request;
  });
  EXPECT_EQ(r.steps, 3);
  EXPECT_NEAR(r.all.ttft_ms.most(), 10.0 + 64 * 0.2, 0.5);
  EXPECT_NEAR(r.all.inter_token_ms.mean(), 10.2, 0.5);
  ExpectBooksBalanced(r);
}

// Deadlines are what the admission can act upon: who could not be served in time is told at once.
TEST(Simulator, GoodputDoesNotCollapseUnderThreeTimesTheCapacity) {
  SimOptions options = Options();
  options.ttft_target_ms = 0.0;
  double peak = 0.0, overloaded = 0.0;
  for (double rate : {6.0, 8.0, 10.0, 12.0, 14.0, 36.0}) {
    const SimResult r = Simulate(options, Poisson(rate, rate > 30.0 ? 3600.0 : 600.0, 1,
                                                  [](SimRequest* request, auto&) { request->deadline_s = 5.0; }));
    ExpectBooksBalanced(r);
    (rate < 30.0 ? peak : overloaded) = rate < 30.0 ? std::max(peak, r.goodput_per_s()) : r.goodput_per_s();
    EXPECT_LE(r.most_waiting, options.admission.max_waiting_requests);
    EXPECT_LT(r.longest_queue_age_s, 5.0);
    EXPECT_LE(r.most_kv_blocks, options.kv_blocks);
  }
  EXPECT_GT(overloaded, 0.9 * peak);
}

TEST(Simulator, TenantsShareByWeightWhereBothSaturate) {
  SimOptions options = Options();
  options.scheduler.tenant_weights = "paying=3";
  options.admission.tenant_max_waiting_requests = 40;
  const SimResult r = Simulate(options, Poisson(60.0, 300.0, 2, [](SimRequest* request, std::mt19937_64& random) {
                                 request->tenant = random() % 2 == 0 ? "free" : "paying";
                               }));
  const auto tokens = [&](const char* who) {
    const SimResult::Served& served = r.tenants.at(who);
    return static_cast<double>(served.prompt_tokens + served.output_tokens);
  };
  EXPECT_NEAR(tokens("paying") / tokens("free"), 3.0, 0.3);
  ExpectBooksBalanced(r);
}

TEST(Simulator, AFloodOfBatchHardlyMovesTheInteractive) {
  SimOptions options = Options();
  options.costs.row_ms = 0.02;  // memory binds: rows are nearly free
  const auto interactive = [](SimRequest* request, std::mt19937_64&) { request->urgency = Urgency::kInteractive; };
  const SimResult calm = Simulate(options, Poisson(3.0, 600.0, 3, interactive));
  // The same, and ten times as many of the least urgent: more than there is room for.
  auto first = Poisson(3.0, 600.0, 3, interactive),
       second =
           Poisson(30.0, 600.0, 4, [](SimRequest*request, std::mt19937_64&) { request->urgency = Urgency::kBatch; });
  std::optional<SimRequest> a = first(), b = second();
  const SimResult flooded = Simulate(options, [&] {
    std::optional<SimRequest>& earlier = !b.has_value() || (a.has_value() && a->arrival_s <= b->arrival_s) ? a : b;
    const std::optional<SimRequest> given = earlier;
    if (given.has_value()) earlier = &earlier == &a ? first() : second();
    return given;
  });
  const SimClass& before = calm.of_urgency[0];
  const SimClass& after = flooded.of_urgency[0];
  EXPECT_EQ(after.finished, before.finished) << "none is refused for the flood";
  EXPECT_GT(flooded.account.refused_total(), 0);
  EXPECT_LT(after.inter_token_ms.Quantile(0.99), 1.2 * before.inter_token_ms.Quantile(0.99));
  EXPECT_LT(after.ttft_ms.Quantile(0.99), 1.2 * before.ttft_ms.Quantile(0.99));
}

TEST(Simulator, SharesPrefixes) {
  SimOptions options = Options();
  const SimResult r = Simulate(options, Poisson(2.0, 100.0, 5, [](SimRequest* request, std::mt19937_64&) {
                                 request->shared_prefix_tokens = 96;
                               }));
  EXPECT_GT(r.cached_prompt_tokens, (r.account.finished - 2) * 96);
  EXPECT_LE(r.cached_prompt_tokens, r.account.finished * 96);
}

// A dense step takes four times as long as a sparse one.
SimOptions Speculating(SpeculationMode mode, double acceptance) {
  SimOptions options = Options();
  options.costs.dense_ms = options.costs.exact_ms = 20.0;
  options.costs.predicted_ms = 5.0;
  options.costs.check_row_ms = 0.3;
  options.speculation.mode = mode;
  options.draft_acceptance = acceptance;
  return options;
}

double SecondsFor(const SimOptions& options, int together) {
  int given = 0;
  const SimResult r = Simulate(options, [&]() -> std::optional<SimRequest> {
    if (given == 8 * together) return std::nullopt;
    SimRequest request;
    request.arrival_s = 100.0 * (given++ / together);  // NOLINT: whole groups
    request.prompt_tokens = 16;
    request.output_tokens = request.max_new_tokens = 500;
    return request;
  });
  ExpectBooksBalanced(r);
  return r.all.inter_token_ms.mean() * static_cast<double>(r.all.inter_token_ms.count()) / 1e3;
}

TEST(Simulator, SpeculationIsFasterWhereDraftsAreCheapAndRight) {
  for (const int together : {1, 4, 16}) {
    const double off_s = SecondsFor(Speculating(SpeculationMode::kOff, 0.95), together);
    const double gain = together < 16 ? 1.5 : 1.15;  // a check has 32 rows at most
    EXPECT_LT(SecondsFor(Speculating(SpeculationMode::kAuto, 0.95), together), off_s / gain) << together;
    EXPECT_GT(SecondsFor(Speculating(SpeculationMode::kAlways, 0.0), together), off_s * 1.5) << together;
  }
}

// Of thousands of steps it tries few.
TEST(Simulator, AutomaticSpeculationCostsNextToNothingWhereItDoesNotPay) {
  for (const int together : {1, 4, 16}) {
    for (const double acceptance : {0.0, 0.2}) {
      const double off_s = SecondsFor(Speculating(SpeculationMode::kOff, acceptance), together);
      EXPECT_LT(SecondsFor(Speculating(SpeculationMode::kAuto, acceptance), together), off_s * 1.02)
          << together << " at " << acceptance;
    }
    SimOptions dear = Speculating(SpeculationMode::kAuto, 0.95);
    dear.costs.predicted_ms = 19.0;
    EXPECT_LT(SecondsFor(dear, together), SecondsFor(Speculating(SpeculationMode::kOff, 0.95), together) * 1.02)
        << together;
  }
}

TEST(Simulator, ABurstKeepsToTheTargetBetweenTokens) {
  SimOptions options = Speculating(SpeculationMode::kAuto, 0.95);
  options.scheduler.inter_token_target_ms = 45.0;
  int given = 0;
  const SimResult r = Simulate(options, [&]() -> std::optional<SimRequest> {
    if (given++ == 4) return std::nullopt;
    SimRequest request;
    request.prompt_tokens = 16;
    request.output_tokens = request.max_new_tokens = 500;
    return request;
  });
  EXPECT_GT(r.speculation.rounds, 100);
  EXPECT_LT(r.all.inter_token_ms.Quantile(0.99), 47.0);
}

}  // namespace
}  // namespace dejavu
