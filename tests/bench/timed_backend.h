// TimedBackend: a backend that measures how long another one takes for each part of a step. Switched off it only passes
// calls on. CPU only: it takes an op for finished when the call returns. One thread at a time.
#ifndef TESTS_BENCH_TIMED_BACKEND_H_
#define TESTS_BENCH_TIMED_BACKEND_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/opt_weights.h"
#include "kernels/backend.h"

namespace dejavu {

// The predictor's first stage counts as kProjections where it rides along in QKV.
enum class StepPart { kProjections, kAttention, kPredictor, kSelection, kMlp, kHead, kRest };
inline constexpr std::array<const char*, 7> kStepPartNames = {"projections", "attention", "predictor", "selection",
                                                              "mlp",         "head",      "rest"};
inline constexpr size_t kStepParts = kStepPartNames.size();

class TimedBackend final : public Backend {
 public:
  explicit TimedBackend(std::unique_ptr<Backend> timed) : timed_(std::move(timed)) {}

  // Which product is which. Those of other weights count as kPredictor.
  void SetWeights(const OptWeights& weights);
  void Start();
  void Stop() { on_ = false; }
  double seconds(StepPart part) const { return seconds_[static_cast<size_t>(part)]; }

  // The model's keys and values, as WriteKv has met them.
  const std::vector<KvLayer>& kv() const { return kv_; }

  std::string Description() const override { return timed_->Description(); }
  BackendStats stats() const override { return timed_->stats(); }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override { return timed_->Allocate(bytes); }
  void Upload(Tensor target, const void* source) override;
  void Download(void* target, Tensor source) override;
  void Synchronize() override { timed_->Synchronize(); }
  void Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate) override;
  void LayerNorm(Tensor y, Tensor x, const NormWeights& norm) override;
  void Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
              const Ride& ride) override;
  void WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) override;
  void Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                 const Selection& heads) override;
  void Select(const Selection& selection, Tensor counts, Tensor a, const SelectorWeights& w, Tensor points) override;
  void Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, bool skip_zeros, Tensor hidden,
           Tensor active) override;
  void Audit(Tensor result, Tensor x, const LinearWeights& up, Tensor worth, const Selection& neurons,
             Tensor hidden) override;
  void Add(Tensor x, Tensor y) override;
  void GatherRows(Tensor y, Tensor x, Tensor ids) override;

 private:
  template <typename Op>
  void Time(StepPart part, Op&& op);

  const std::unique_ptr<Backend> timed_;
  bool on_ = false;
  std::array<double, kStepParts> seconds_{};
  absl::flat_hash_map<const void*, StepPart> parts_;  // of the product with the weights at that address
  std::vector<KvLayer> kv_;
};

}  // namespace dejavu

#endif  // TESTS_BENCH_TIMED_BACKEND_H_
