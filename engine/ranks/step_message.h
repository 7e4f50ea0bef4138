// What rank 0 tells the others before a step: the batch, which layers are switched and whether counts are wanted, as
// words of 32 bits in the order of the machine. No pointers; the size is bounded by the batch's capacity. What comes
// from another process is checked before it is believed.
#ifndef ENGINE_RANKS_STEP_MESSAGE_H_
#define ENGINE_RANKS_STEP_MESSAGE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/model/batch.h"
#include "engine/model/predictor.h"
#include "kernels/communicator.h"

namespace dejavu {

inline constexpr int32_t kStepMessageVersion = 3;

enum class StepKind : int32_t {
  kStep,
  kPing,  // nothing to do: everyone is there
  kStop,  // the last message
};

class StepChannel {
 public:
  // For batches of the shape of `largest` with positions below `context` and blocks below `kv_blocks`.
  StepChannel(Communicator& communicator, const Batch& largest, int32_t layers, int32_t context, int32_t kv_blocks);

  // Rank 0. The block table goes along where it has changed since it last did.
  void SendStep(const Batch& batch, const Predictor& predictor, bool wants_counts);
  void Send(StepKind kind);

  // The others: waits, and fills `batch` and the predictor's switches where it is a step. INVALID_ARGUMENT with the
  // field and its value for what no rank 0 of this version sends.
  struct Received {
    StepKind kind = StepKind::kStep;
    bool wants_counts = false;
  };
  absl::StatusOr<Received> Receive(Batch* batch, Predictor* predictor);

 private:
  void Broadcast(StepKind kind);
  absl::Status Read(Batch* batch, Predictor* predictor, bool* wants_counts);

  Communicator& comm_;
  const int32_t layers_, context_, kv_blocks_;
  std::vector<int32_t> words_;  // capacity of the largest message
  size_t used_ = 0;
  std::vector<int32_t> sent_table_;  // rank 0
  std::vector<int32_t> switches_;    // [layers]
};

}  // namespace dejavu

#endif  // ENGINE_RANKS_STEP_MESSAGE_H_
