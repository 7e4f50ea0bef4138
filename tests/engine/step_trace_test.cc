#include "engine/step_trace.h"

#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

SteadyTime At(double ms) {
  return SteadyTime(std::chrono::hours(1)) +
         std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double, std::milli>(ms));
}

// A step that ends a gap of one request.
void Note(int64_t step, double gap_ms, double at_ms, StepTrace* trace) {
  trace->NoteToken(/*sequence=*/7, At(at_ms), At(at_ms - gap_ms), /*steps=*/1, /*generated_tokens=*/2);
  StepRecord record;
  record.step = step;
  record.start = At(at_ms - gap_ms);
  record.decode_rows = 1;
  trace->NoteStep(record);
}

std::vector<float> GapsOf(const StepTrace& trace) {
  std::vector<float> gaps;
  for (const SlowToken& token : trace.SlowestTokens()) gaps.push_back(token.gap_ms);
  return gaps;
}

TEST(StepTrace, HoldsTheLastStepsInOrder) {
  const auto trace = std::make_unique<StepTrace>();
  EXPECT_THAT(trace->StepsAfter(0), IsEmpty());
  for (int i = 1; i <= StepTrace::kSteps + 10; ++i) Note(i, 1.0, i, trace.get());
  EXPECT_EQ(trace->noted(), StepTrace::kSteps + 10);
  const std::vector<StepRecord> all = trace->StepsAfter(0);
  ASSERT_EQ(all.size(), size_t{StepTrace::kSteps});
  EXPECT_EQ(all.front().step, 11);
  EXPECT_EQ(all.back().step, StepTrace::kSteps + 10);
  const std::vector<StepRecord> last = trace->StepsAfter(trace->noted() - 2);
  ASSERT_EQ(last.size(), 2u);
  EXPECT_EQ(last[0].step + 1, last[1].step);
  EXPECT_THAT(trace->StepsAfter(trace->noted()), IsEmpty());
}

TEST(StepTrace, KeepsTheSlowestTokenOfAStepAndTheSlowestOfAll) {
  const auto trace = std::make_unique<StepTrace>();
  trace->NoteToken(1, At(10), At(8), 1, 5);
  trace->NoteToken(2, At(10), At(3), 4, 6);
  trace->NoteToken(3, At(10), At(9), 1, 7);
  StepRecord record;
  record.step = 42;
  trace->NoteStep(record);
  ASSERT_THAT(GapsOf(*trace), ElementsAre(7.0f));
  const SlowToken slow = trace->SlowestTokens()[0];
  EXPECT_EQ(slow.sequence, 2u);
  EXPECT_EQ(slow.steps, 4);
  EXPECT_EQ(slow.generated_tokens, 6);
  EXPECT_EQ(slow.step.step, 42);
  record.step = 43;
  trace->NoteStep(record);  // without a token
  EXPECT_EQ(GapsOf(*trace).size(), 1u);

  for (int i = 1; i <= 200; ++i) Note(100 + i, i, 20 + i, trace.get());
  const std::vector<float> gaps = GapsOf(*trace);
  ASSERT_EQ(gaps.size(), size_t{StepTrace::kSlowTokens});
  EXPECT_EQ(gaps.front(), 200.0f);
  EXPECT_EQ(gaps.back(), 200.0f - StepTrace::kSlowTokens + 1);
}

TEST(StepTrace, ForgetsWhatWasSlowLongAgo) {
  const auto trace = std::make_unique<StepTrace>();
  const double a_while = std::chrono::duration<double, std::milli>(StepTrace::kWhile).count() + 1;
  Note(1, 9.0, 0, trace.get());
  Note(2, 5.0, a_while, trace.get());
  EXPECT_THAT(GapsOf(*trace), ElementsAre(9.0f, 5.0f));
  Note(3, 2.0, 2 * a_while, trace.get());
  EXPECT_THAT(GapsOf(*trace), ElementsAre(5.0f, 2.0f));
}

// Every record that a reader gets was written as a whole.
TEST(StepTrace, IsReadWhileItIsWritten) {
  const auto trace = std::make_unique<StepTrace>();
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (int i = 1; i <= 50'000; ++i) {
      trace->NoteToken(i, At(i), At(0), i, i);
      StepRecord record;
      record.step = record.weight_bytes = i;
      record.decode_rows = record.prefill_rows = record.shadow_rows = i;
      trace->NoteStep(record);
    }
    done = true;
  });
  int64_t torn = 0;
  while (!done) {
    for (const StepRecord& s : trace->StepsAfter(0)) torn += s.weight_bytes != s.step || s.shadow_rows != s.step;
    for (const SlowToken& t : trace->SlowestTokens()) {
      torn += t.step.step != static_cast<int64_t>(t.sequence) || t.steps != t.generated_tokens;
    }
  }
  writer.join();
  EXPECT_EQ(torn, 0);
}

}  // namespace
}  // namespace dejavu
