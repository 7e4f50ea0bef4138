#include "engine/scheduling/admission.h"

#include "engine/scheduling/cost_model.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using std::chrono::milliseconds;

Request Asking(int prompt, int output, const std::string& tenant = "") {
  Request request;
  request.prompt.resize(prompt);
  request.max_new_tokens = output;
  request.tenant = tenant;
  request.sparsity.tier = Tier::kDense;
  return request;
}

void ExpectRefused(const absl::Status& status, absl::StatusCode code, const char* reason) {
  EXPECT_EQ(status.code(), code) << status;
  const auto info = RefusalOf(status);
  ASSERT_TRUE(info.has_value());
  EXPECT_STREQ(Name(info->reason.value()), reason);
  EXPECT_GE(info->retry_after, milliseconds(100));
}

void ExpectBalanced(const Account& a) {
  EXPECT_EQ(a.received, a.finished + a.refused_total() + a.cancelled + a.failed + a.live);
}

TEST(Admission, BoundsTheQueueInRequestsAndTokensForAllAndForEachTenant) {
  AdmissionOptions options;
  options.max_waiting_requests = 3;
  options.max_waiting_tokens = 100;
  options.tenant_max_waiting_requests = 2;
  options.tenant_max_waiting_tokens = 60;
  Admission admission(options);
  const SteadyTime now;
  EXPECT_TRUE(admission.Admit(Asking(30, 1, "a"), now).ok());
  ExpectRefused(admission.Admit(Asking(31, 1, "a"), now), absl::StatusCode::kResourceExhausted, "TENANT_TOKENS");
  EXPECT_TRUE(admission.Admit(Asking(20, 1, "a"), now).ok());
  ExpectRefused(admission.Admit(Asking(1, 1, "a"), now), absl::StatusCode::kResourceExhausted, "TENANT_REQUESTS");
  ExpectRefused(admission.Admit(Asking(51, 1, "b"), now), absl::StatusCode::kResourceExhausted, "QUEUE_TOKENS");
  EXPECT_TRUE(admission.Admit(Asking(50, 1, "b"), now).ok());
  ExpectRefused(admission.Admit(Asking(1, 1, "c"), now), absl::StatusCode::kResourceExhausted, "QUEUE_FULL");
  admission.Scheduled(Asking(30, 1, "a"));
  EXPECT_TRUE(admission.Admit(Asking(1, 1, "a"), now).ok()) << "what runs does not count";
  EXPECT_EQ(admission.account().live, 4);
  ExpectBalanced(admission.account());
}

TEST(Admission, SamplesComeInTogetherOrNotAtAll) {
  AdmissionOptions options;
  options.max_waiting_requests = 4;
  options.tenant_max_waiting_requests = 3;
  Admission admission(options);
  const SteadyTime now;
  ExpectRefused(admission.Admit(Asking(1, 1), now, nullptr, 5), absl::StatusCode::kResourceExhausted, "QUEUE_FULL");
  ExpectRefused(admission.Admit(Asking(1, 1), now, nullptr, 4), absl::StatusCode::kResourceExhausted,
                "TENANT_REQUESTS");
  EXPECT_TRUE(admission.Admit(Asking(1, 1), now, nullptr, 3).ok());
  EXPECT_EQ(admission.waiting(), 3);
  ExpectRefused(admission.Admit(Asking(1, 1, "a"), now, nullptr, 2), absl::StatusCode::kResourceExhausted,
                "QUEUE_FULL");
  EXPECT_TRUE(admission.Admit(Asking(1, 1, "a"), now).ok());
  EXPECT_EQ(admission.account().received, 5 + 4 + 3 + 2 + 1);
  EXPECT_EQ(admission.account().refused_total(), 5 + 4 + 2);
  ExpectBalanced(admission.account());
}

TEST(Admission, AnEmptyQueueTakesAnyPrompt) {
  AdmissionOptions options;
  options.max_waiting_tokens = 10;
  Admission admission(options);
  EXPECT_TRUE(admission.Admit(Asking(500, 1), SteadyTime()).ok());
}

TEST(Admission, RefusesADeadlineThatCannotBeMetAndSaysHowLongItWouldTake) {
  Admission admission(AdmissionOptions{});
  Request request = Asking(64, 100);
  const SteadyTime now;
  request.deadline = now + milliseconds(500);
  EXPECT_TRUE(admission.Admit(request, now).ok()) << "nothing is known yet";
  CostParameters costs;
  costs.dense_ms = costs.exact_ms = costs.predicted_ms = 10.0;
  costs.prefill_token_ms = 1.0;
  admission.SetLoad({.costs = costs, .learned = true});
  EXPECT_NEAR(admission.PredictMs(request), 64 + 10 + 990, 1.0);
  const absl::Status refused = admission.Admit(request, now);
  ExpectRefused(refused, absl::StatusCode::kDeadlineExceeded, "DEADLINE_INFEASIBLE");
  EXPECT_NE(refused.message().find("1064 ms"), std::string::npos) << refused;
  request.deadline = now + milliseconds(1100);
  EXPECT_TRUE(admission.Admit(request, now).ok());
}

TEST(Admission, AQueueAheadCostsTimeButNotThatOfTheLessUrgent) {
  SchedulerOptions scheduler;
  scheduler.max_batch = 1;
  Admission admission(AdmissionOptions{}, scheduler);
  CostParameters costs;
  costs.dense_ms = 10.0;
  admission.SetLoad(
      {.costs = costs, .learned = true, .costliest_tier = Tier::kDense, .running = 1, .first_free_steps = 50});
  Request request = Asking(1, 1);
  const double alone = admission.PredictMs(request);
  EXPECT_NEAR(alone, 500 + 10, 1.0);
  Request batch = Asking(1, 100);
  batch.urgency = Urgency::kBatch;
  ASSERT_TRUE(admission.Admit(batch, SteadyTime()).ok());
  EXPECT_NEAR(admission.PredictMs(request), alone, 1.0);
  ASSERT_TRUE(admission.Admit(Asking(1, 100), SteadyTime()).ok());
  EXPECT_NEAR(admission.PredictMs(request), alone + 1000, 1.0);
}

TEST(Admission, LearnsHowMuchLongerThingsTakeThanPredicted) {
  Admission admission(AdmissionOptions{});
  CostParameters costs;
  costs.dense_ms = 10.0;
  admission.SetLoad({.costs = costs, .learned = true, .costliest_tier = Tier::kDense});
  const Request request = Asking(1, 101);
  const double before = admission.PredictMs(request);
  for (int i = 0; i < 500; ++i) admission.NoteOutcome(admission.Predict(request), 2.0 * before, 101);
  EXPECT_NEAR(admission.PredictMs(request) / before, 2.0, 0.1);
  for (int i = 0; i < 2000; ++i) admission.NoteOutcome(admission.Predict(request), 0.5 * before, 101);
  EXPECT_NEAR(admission.PredictMs(request) / before, 1.0, 0.05);
}

TEST(Admission, KeepsTheBooks) {
  Admission admission(AdmissionOptions{});
  for (FinishReason reason : {FinishReason::kEos, FinishReason::kTime, FinishReason::kCancelled,
                              FinishReason::kDeadline, FinishReason::kError}) {
    ASSERT_TRUE(admission.Admit(Asking(1, 1, "t"), SteadyTime()).ok());
    ExpectBalanced(admission.account());
    admission.Ended(Asking(1, 1, "t"), reason, /*waiting=*/true);
    ExpectBalanced(admission.account());
  }
  (void)admission.Refuse(Refusal::kInvalid, absl::InvalidArgumentError("x"), milliseconds(0));
  ExpectBalanced(admission.account());
  EXPECT_EQ(admission.account().finished, 2);
  EXPECT_EQ(admission.account().cancelled, 2);
  EXPECT_EQ(admission.account().failed, 1);
  EXPECT_EQ(admission.account().live, 0);
  EXPECT_EQ(admission.waiting(), 0);
}

TEST(CostModel, LearnsWhatStepsTakeAndFollowsChanges) {
  CostParameters truth;
  truth.dense_ms = 20.0;
  truth.exact_ms = 15.0;
  truth.row_ms = 0.5;
  truth.prefill_token_ms = 0.25;
  truth.context_token_ms = 0.001;
  CostModel model;
  const auto run = [&](int steps) {
    for (int i = 0; i < steps; ++i) {
      const StepShape shape{i % 3 == 0 ? Tier::kDense : Tier::kExact, 1 + i % 16, i % 5 == 0 ? 16 * (i % 4) : 0,
                            int64_t{100} * (i % 37)};
      const double noise = 1.0 + 0.05 * ((i * 7919) % 11 - 5) / 5.0;
      // One step in fifty is interrupted.
      model.Observe(shape, CostModel(truth).Predict(shape) * (i % 50 == 49 ? 8.0 : noise));
    }
  };
  EXPECT_FALSE(model.learned());
  run(500);
  EXPECT_TRUE(model.learned());
  const StepShape shape{Tier::kDense, 8, 32, 4000};
  EXPECT_NEAR(model.Predict(shape) / CostModel(truth).Predict(shape), 1.0, 0.1);
  EXPECT_NEAR(model.parameters().prefill_token_ms, truth.prefill_token_ms, 0.08);
  truth.dense_ms = truth.exact_ms = 60.0;
  run(1500);
  EXPECT_NEAR(model.Predict(shape) / CostModel(truth).Predict(shape), 1.0, 0.1);
}

TEST(CostModel, ATierThatNeverRanCostsWhatTheDearestDid) {
  CostModel model;
  for (int i = 0; i < 30; ++i) model.Observe({Tier::kExact, 1 + i % 4, 0, 0}, 12.0);
  EXPECT_NEAR(model.Predict({Tier::kDense, 1, 0, 0}), 12.0, 0.5);
}

}  // namespace
}  // namespace dejavu
