// Flights: the steps that the device has been given and the host has not seen yet, two at most, and what they leave.
// Where the device runs ahead, the next step is launched before this one is awaited. Engine thread.
#ifndef ENGINE_SERVING_FLIGHTS_H_
#define ENGINE_SERVING_FLIGHTS_H_

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "engine/model/batch.h"
#include "engine/model/predictor.h"
#include "engine/ranks/model_group.h"

namespace dejavu {

class Flights {
 public:
  Flights(ModelGroup& group, int32_t max_logit_rows, int32_t vocab)
      : group_(group), logits_(static_cast<size_t>(max_logit_rows) * vocab) {
    for (Flight& flight : flights_) {
      flight.drawn.resize(max_logit_rows);
      flight.details.resize(static_cast<size_t>(max_logit_rows) * kDetailFields);
      flight.counts = group.predictor().MakeCounts();
    }
  }

  // The step that Await waits for next, or the one after it.
  void Launch(const Batch& batch) { Launch(batch, flights_[current_]); }
  void LaunchAhead(const Batch& batch) {
    Launch(batch, flights_[1 - current_]);
    ahead_ = true;
  }
  bool ahead() const { return ahead_; }
  // The step that was launched ahead becomes the one that Await waits for. False: there is none.
  bool TakeAhead() {
    if (!ahead_) return false;
    current_ = 1 - current_;
    ahead_ = false;
    return true;
  }
  // The step that was launched ahead is of no use any more.
  void DropAhead(const Batch& batch) {
    ahead_ = false;
    Await(batch, flights_[1 - current_]);
  }

  // Waits. What the step left is valid until the next launch but one; logits() until the next launch.
  void Await(const Batch& batch) { Await(batch, flights_[current_]); }
  const StepCounts& counts() const { return flights_[current_].counts; }
  const int32_t* drawn() const { return flights_[current_].drawn.data(); }      // [logit rows], where the device drew
  const int32_t* details() const { return flights_[current_].details.data(); }  // [logit rows, batch.detail_fields()]
  float* logits() { return logits_.data(); }  // [max logit rows, vocab], where it did not, or keeps them

 private:
  struct Flight {
    uint64_t mark = 0;
    std::vector<int32_t> drawn;    // [max logit rows]
    std::vector<int32_t> details;  // [max logit rows, kDetailFields]
    StepCounts counts;
  };
  StepOutputs OutputsOf(Flight& flight) {
    return {logits_.data(), flight.drawn.data(), &flight.counts, /*counts_dense=*/false, flight.details.data()};
  }
  void Launch(const Batch& batch, Flight& flight) { flight.mark = group_.Launch(batch, OutputsOf(flight)); }
  void Await(const Batch& batch, Flight& flight) { group_.Await(flight.mark, batch, OutputsOf(flight)); }

  ModelGroup& group_;
  std::vector<float> logits_;
  std::array<Flight, 2> flights_;
  size_t current_ = 0;
  bool ahead_ = false;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_FLIGHTS_H_
