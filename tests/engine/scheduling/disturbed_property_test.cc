// What is learned from measured time, where the system holds steps up: outliers, pauses of the process, long spells of
// slowness. Scheduler and admission on a virtual clock, with a truth that costs and predictions are held against.
#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "engine/scheduling/admission.h"
#include "engine/scheduling/scheduler.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

constexpr int kBlocks = 256, kBlockTokens = 16, kContext = 512, kSlots = 4;

SchedulerOptions Options() {
  SchedulerOptions options;
  options.max_batch = kSlots;
  options.max_step_tokens = 64;
  options.prefill_chunk_tokens = 32;
  return options;
}

// A device of known speed, with the scheduler in front of it.
class Device {
 public:
  Device(const CostParameters& truth, CostModel costs)
      : truth_(truth),
        pool_(kBlocks, kBlockTokens),
        scheduler_(pool_, Options(), std::move(costs)),
        batch_(Options().max_step_tokens, kSlots + Options().score_rows, kSlots, kContext / kBlockTokens) {}

  void Enqueue(const Request& request) {
    auto s = std::make_unique<Sequence>(request, nullptr);
    s->id = next_id_++;
    scheduler_.Enqueue(std::move(s));
  }

  // One step, which takes what `held_up` makes of the truth, in ms. Calls on_begin(sequence) for each that begins, and
  // on_end(sequence) for each that has ended.
  template <typename HeldUp, typename OnBegin, typename OnEnd>
  double Step(SteadyTime now, const HeldUp& held_up, const OnBegin& on_begin, const OnEnd& on_end) {
    scheduler_.Plan(now, batch_);
    for (const Sequence* s : scheduler_.admitted()) on_begin(*s);
    const double ms = held_up(truth_.Predict(scheduler_.shape()));
    std::vector<const Sequence*> done;
    for (const auto& s : scheduler_.running()) {
      if (s->step_logits == 0) continue;
      s->tokens.push_back(0);
      if (s->generated_tokens() == s->request.max_new_tokens) done.push_back(s.get());
    }
    scheduler_.NoteStep(ms);
    for (const Sequence* s : done) on_end(*scheduler_.Remove(*s));
    return ms;
  }

  bool idle() const { return scheduler_.running().empty() && scheduler_.waiting().empty(); }
  Scheduler& scheduler() { return scheduler_; }

 private:
  const CostModel truth_;
  BlockPool pool_;
  Scheduler scheduler_;
  Batch batch_;
  uint64_t next_id_ = 1;
};

class World {
 public:
  explicit World(uint64_t seed)
      : random_(seed), truth_(Truth()), admission_(AdmissionOptions(), Options()), device_(truth_, CostModel()) {
    // As the engine warms up.
    for (int i = 0; i < 3; ++i) {
      for (const StepShape& shape : {StepShape{Tier::kExact, 1, 0, 0}, StepShape{Tier::kExact, kSlots, 0, 6},
                                     StepShape{Tier::kExact, 1, 32, 0}}) {
        device_.scheduler().Learn(shape, CostModel(truth_).Predict(shape));
      }
    }
    device_.scheduler().Inform(admission_);
  }

  Request Draw() {
    Request request;
    request.prompt.resize(1 + Below(200));
    request.max_new_tokens = 1 + Below(60);
    request.sparsity.tier = kAllTiers[Below(5)];
    return request;
  }
  int Below(int limit) { return std::uniform_int_distribution<int>(0, limit - 1)(random_); }

  // Nothing runs, and this request would take so long if nothing held it up.
  double AloneMs(const Request& request) const {
    Device device(truth_, CostModel(truth_));
    device.Enqueue(request);
    const auto ignore = [](const Sequence&) {};
    double ms = 0.0;
    while (!device.idle()) {
      ms += device.Step(
          SteadyTime(), [](double truth) { return truth; }, ignore, ignore);
    }
    return ms;
  }

  bool Admit(Request request, double left_ms) {
    request.deadline = now_ + Lasting(left_ms / 1e3);
    if (!admission_.Admit(request, now_).ok()) return false;
    device_.Enqueue(request);
    return true;
  }

  template <typename HeldUp>
  void RunUntilIdle(const HeldUp& held_up) {
    while (!device_.idle()) {
      const auto on_begin = [&](const Sequence& s) { admission_.Scheduled(s.request); };
      const double ms = device_.Step(now_, held_up, on_begin, [&](const Sequence& s) {
        admission_.Ended(s.request, FinishReason::kLength, /*waiting=*/false);
        // Whatever it was expected to take, it took longer: the margin goes up.
        admission_.NoteOutcome({1e-3, 1e-3}, 1e6, s.generated_tokens());
      });
      device_.scheduler().Inform(admission_);
      now_ += Lasting(ms / 1e3);
    }
  }

  void Pass(double seconds) { now_ += Lasting(seconds); }

 private:
  CostParameters Truth() {
    CostParameters truth;
    truth.dense_ms = 0.2 + Below(100) / 10.0;
    truth.exact_ms = truth.dense_ms * (0.5 + Below(50) / 100.0);
    truth.predicted_ms = truth.exact_ms * (0.3 + Below(70) / 100.0);
    truth.row_ms = truth.dense_ms * Below(20) / 100.0;
    truth.prefill_token_ms = truth.dense_ms * (1 + Below(30)) / 100.0;
    truth.context_token_ms = truth.dense_ms * Below(20) / 1e4;
    return truth;
  }

  std::mt19937_64 random_;
  const CostParameters truth_;
  Admission admission_;
  Device device_;
  SteadyTime now_;
};

// Steps that take a few per cent more or less; some are held up a thousandfold, or while the process stands still for a
// minute, up to kNewLevel - 1 of them in a row. Deadlines leave twice what the call needs, since the server may know
// from steps of several rows alone what one row costs.
TEST(Disturbed, AnIdleServerAdmitsACallThatItCanFinish) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    World world(seed);
    for (const Tier tier : kAllTiers) {
      Request first = world.Draw();
      first.sparsity.tier = tier;
      ASSERT_TRUE(world.Admit(first, 1e9));
      world.RunUntilIdle([](double ms) { return ms; });
    }
    int disturbed = 0;  // steps to come; below 0: those that are not
    const auto held_up = [&](double ms) {
      if (disturbed == 0 && world.Below(40) == 0) disturbed = world.Below(CostModel::kNewLevel);
      const double usual = ms * (0.97 + world.Below(15) / 100.0);
      if (disturbed <= 0) {
        disturbed = 0;
        return usual;
      }
      if (--disturbed == 0) disturbed = -1;
      return world.Below(2) == 0 ? usual * 1000.0 : usual + 60e3;
    };
    for (int call = 0; call < 100; ++call) {
      const Request request = world.Draw();
      const double alone_ms = world.AloneMs(request);
      ASSERT_TRUE(world.Admit(request, 2.0 * alone_ms)) << "seed " << seed << ", call " << call << " of " << alone_ms;
      // Others come while it runs.
      for (int i = world.Below(4); i > 0; --i) world.Admit(world.Draw(), 1e9);
      world.RunUntilIdle(held_up);
      world.Pass(world.Below(100));
    }
  }
}

// A server that was slow for long cannot know that it is fast again, but it finds out.
TEST(Disturbed, AnIdleServerThatWasSlowForLongAdmitsWithinMinutes) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    World world(seed);
    for (int call = 0; call < 60; ++call) {
      ASSERT_TRUE(world.Admit(world.Draw(), 1e9));
      world.RunUntilIdle([](double ms) { return 100.0 * ms; });
    }
    const Request request = world.Draw();
    const double enough_ms = 1.25 * world.AloneMs(request);
    EXPECT_FALSE(world.Admit(request, enough_ms)) << "how should it know?";
    int waited_s = 0;
    for (; !world.Admit(request, enough_ms); waited_s += 10) {
      ASSERT_LT(waited_s, 600) << "seed " << seed;
      world.Pass(10.0);
    }
    world.RunUntilIdle([](double ms) { return ms; });
    // And from then on it knows.
    EXPECT_TRUE(world.Admit(request, enough_ms)) << "seed " << seed;
  }
}

// It doubts its predictions for being refused, not for being idle.
TEST(Disturbed, AnIdleServerStillRefusesWhatItCannotFinish) {
  World world(1);
  ASSERT_TRUE(world.Admit(world.Draw(), 1e9));
  world.RunUntilIdle([](double ms) { return ms; });
  world.Pass(3600.0);
  const Request request = world.Draw();
  EXPECT_FALSE(world.Admit(request, 0.5 * world.AloneMs(request)));
  world.Pass(1.0);
  EXPECT_FALSE(world.Admit(request, 0.5 * world.AloneMs(request)));
}

class HeldUp : public ::testing::TestWithParam<double> {
 protected:
  HeldUp() {
    truth_.dense_ms = 2.0;
    truth_.exact_ms = 1.5;
    truth_.predicted_ms = 1.0;
    truth_.row_ms = 0.05;
    truth_.prefill_token_ms = 0.02;
    Run(500, 1.0);
  }

  // Steps of every kind that take so many times the truth, and a little more or less.
  void Run(int steps, double times) {
    for (int i = 0; i < steps; ++i, ++made_) {
      const StepShape shape = Shape(made_);
      model_.Observe(shape, CostModel(truth_).Predict(shape) * times * (0.96 + 0.01 * (made_ * 7919 % 9)));
    }
  }
  static StepShape Shape(int i) { return {kAllTiers[i % 5], 1 + i % 16, i % 7 == 0 ? 16 : 0, int64_t{100} * (i % 13)}; }

  // The most, of all kinds of steps, by which predictions are above the truth; and the least.
  std::pair<double, double> Ratios() const {
    double most = 0.0, least = 1e9;
    for (int i = 0; i < 5 * 7 * 13 * 16; ++i) {
      const double ratio = model_.Predict(Shape(i)) / CostModel(truth_).Predict(Shape(i));
      most = std::max(most, ratio);
      least = std::min(least, ratio);
    }
    return {most, least};
  }

  CostParameters truth_;
  CostModel model_;
  int made_ = 0;
};

TEST_P(HeldUp, AFewStepsMoveTheFitByABoundedShare) {
  EXPECT_LT(Ratios().first, 1.05);
  for (int times = 0; times < 5; ++times) {
    for (int held_up = 1; held_up < CostModel::kNewLevel; ++held_up) {
      Run(held_up, GetParam());
      EXPECT_LT(Ratios().first, 1.5) << held_up << " in a row";
      EXPECT_GT(Ratios().second, 0.8);
      Run(100, 1.0);
    }
  }
  EXPECT_LT(Ratios().first, 1.2);
}

TEST_P(HeldUp, ManyAreBelievedBothWays) {
  const double times = std::min(GetParam(), 1000.0);
  Run(3 * CostModel::kNewLevel, times);
  EXPECT_LT(Ratios().first, 2.0 * times);
  EXPECT_GT(Ratios().second, 0.5 * times);
  Run(3 * CostModel::kNewLevel, 1.0);
  EXPECT_LT(Ratios().first, 2.0);
  EXPECT_GT(Ratios().second, 0.5);
}

// A machine where nearly every step waits for the processor: a server that has just warmed up on it hears nothing but
// noise, from steps that are all alike. Whatever it makes of them, no step is expected to take longer than the longest.
TEST(Starved, NothingIsPredictedToTakeLongerThanAnythingDid) {
  constexpr int kRows = 16;
  CostParameters truth;
  truth.dense_ms = truth.exact_ms = truth.predicted_ms = 20.0;
  truth.row_ms = 3.0;
  truth.prefill_token_ms = 2.0;
  truth.context_token_ms = 0.002;
  const CostModel exact(truth);
  for (uint64_t seed = 0; seed < 200; ++seed) {
    std::mt19937_64 random(seed);
    const auto below = [&](int limit) { return std::uniform_int_distribution<int>(0, limit - 1)(random); };
    CostModel model;
    for (int i = 0; i < 3; ++i) {
      for (const StepShape& shape : {StepShape{Tier::kExact, 1, 0, 0}, StepShape{Tier::kExact, kRows, 0, 120},
                                     StepShape{Tier::kExact, 1, 32, 0}}) {
        model.Observe(shape, exact.Predict(shape));
      }
    }
    double longest_ms = 0.0;
    for (int i = 0; i < 200; ++i) {
      const int32_t rows = kRows - below(3);
      const StepShape shape{kAllTiers[1 + below(4)], rows, below(4) == 0 ? 1 + below(8) : 0, rows * int64_t{20 + i}};
      const double ms = exact.Predict(shape) * (1.0 + below(120) / 10.0);
      longest_ms = std::max(longest_ms, ms);
      model.Observe(shape, ms);
      for (int32_t r = 1; r <= kRows; ++r) {
        ASSERT_LE(model.Predict({kAllTiers[1], r, 0, r * int64_t{20 + i}}), 1.2 * longest_ms)
            << "seed " << seed << ", step " << i << ", " << r << " rows";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Times, HeldUp, ::testing::Values(10.0, 1e3, 1e6));

}  // namespace
}  // namespace dejavu
