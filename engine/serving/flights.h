// Flights: the steps that the device is given, two at most that the host has not seen yet, and what they leave. Where
// the device runs ahead, the next step is launched before this one is awaited. Engine thread.
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
  // Batches have those sizes.
  Flights(ModelGroup& group, int32_t vocab, int32_t max_rows, int32_t max_logit_rows, int32_t slots,
          int32_t blocks_per_slot)
      : group_(group),
        logits_(static_cast<size_t>(max_logit_rows) * vocab),
        flights_{Flight(group, Batch(max_rows, max_logit_rows, slots, blocks_per_slot)),
                 Flight(group, Batch(max_rows, max_logit_rows, slots, blocks_per_slot))} {}

  // The step that Await waits for next, and the one after it: to be planned, then launched.
  Batch& batch() { return flights_[current_].batch; }
  Batch& batch_ahead() { return flights_[1 - current_].batch; }
  void Launch() { Launch(flights_[current_]); }
  void LaunchAhead() {
    Launch(flights_[1 - current_]);
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
  void DropAhead() {
    ahead_ = false;
    Await(flights_[1 - current_]);
  }

  // Waits. What the step left is valid until the next launch but one; logits() until the next launch.
  void Await() { Await(flights_[current_]); }
  const StepCounts& counts() const { return flights_[current_].counts; }
  const int32_t* drawn() const { return flights_[current_].drawn.data(); }      // [logit rows], where the device drew
  const int32_t* details() const { return flights_[current_].details.data(); }  // [logit rows, batch.detail_fields()]
  float* logits() { return logits_.data(); }  // [max logit rows, vocab], where it did not, or keeps them

 private:
  struct Flight {
    Flight(ModelGroup& group, Batch planned)
        : batch(std::move(planned)),
          drawn(batch.max_logit_rows),
          details(static_cast<size_t>(batch.max_logit_rows) * kDetailFields),
          counts(group.predictor().MakeCounts()) {}
    Batch batch;
    uint64_t mark = 0;
    std::vector<int32_t> drawn;    // [max logit rows]
    std::vector<int32_t> details;  // [max logit rows, kDetailFields]
    StepCounts counts;
  };
  StepOutputs OutputsOf(Flight& flight) {
    return {logits_.data(), flight.drawn.data(), &flight.counts, /*counts_dense=*/false, flight.details.data()};
  }
  void Launch(Flight& flight) { flight.mark = group_.Launch(flight.batch, OutputsOf(flight)); }
  void Await(Flight& flight) { group_.Await(flight.mark, flight.batch, OutputsOf(flight)); }

  ModelGroup& group_;
  std::vector<float> logits_;
  std::array<Flight, 2> flights_;
  size_t current_ = 0;
  bool ahead_ = false;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_FLIGHTS_H_
