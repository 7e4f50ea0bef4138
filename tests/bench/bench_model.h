// BenchModel: a ModelRunner behind a TimedBackend, with tokens to push through it. One thread.
#ifndef TESTS_BENCH_BENCH_MODEL_H_
#define TESTS_BENCH_BENCH_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/eval/tool.h"
#include "engine/ranks/model_runner.h"
#include "tests/bench/timed_backend.h"

namespace dejavu {

const char* WeightsName(DType dtype);  // as --dtype has it: "bf16"

// `wanted` tokens of a file, or random ones where `text` is empty. INVALID_ARGUMENT where the file has fewer.
absl::StatusOr<std::vector<int32_t>> BenchTokens(const std::string& model, const std::string& text, int64_t wanted);

// Whether a model with that predictor, which may be null, serves the tier. CheckServes: INVALID_ARGUMENT where not.
bool Serves(const PredictorData* predictor, Tier tier);
absl::Status CheckServes(const std::string& model, const PredictorData* predictor, Tier tier);

class BenchModel {
 public:
  // Loads the model, with progress on stderr. `text`: a file, or empty for random tokens. INVALID_ARGUMENT where the
  // text is too short or the window longer than the model's context. Options::wrap_backend comes before the
  // TimedBackend.
  static absl::StatusOr<std::unique_ptr<BenchModel>> Create(ModelRunner::Options options, const std::string& text,
                                                            ProgressLine& progress);

  ModelRunner& runner() { return *runner_; }
  TimedBackend& timed() { return *timed_; }
  int32_t TokenAt(int slot, int position) const { return tokens_[slot * window_ + position]; }

  // Runs `count` positions of a slot from `first` as one step of a prompt and returns the seconds it took.
  double Prefill(int slot, int first, int count);

  // Keys and values of the positions before `context`, for every slot. Slots of synthetic models beyond the fourth get
  // copies of the first four, which costs no quality that synthetic models have and saves minutes.
  void FillContext(int context, ProgressLine& progress);

 private:
  BenchModel() = default;
  absl::Status PrepareCopies();
  void CopySlot(int target, int source);

  TimedBackend* timed_ = nullptr;  // owned by runner_
  std::unique_ptr<ModelRunner> runner_;
  std::vector<int32_t> tokens_;  // [slots, window]
  int64_t window_ = 0;
  int filled_ = 0;  // positions that hold what a prefill computed
  Buffer numbers_;  // int32: 0, 1, ...
  bool synthetic_ = false;
};

}  // namespace dejavu

#endif  // TESTS_BENCH_BENCH_MODEL_H_
