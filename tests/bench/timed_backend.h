// TimedBackend: a backend that measures how long another one takes for a step, and on the CPU for each part of it,
// where an op is finished when the call returns. Switched off it only passes calls on. One thread at a time.
#ifndef TESTS_BENCH_TIMED_BACKEND_H_
#define TESTS_BENCH_TIMED_BACKEND_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/model/opt_weights.h"
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

  // The next kMostRuns steps (Backend::Run), by the clock of the device: ms of each, and from its end to the next one's
  // start. Stamping adds some microseconds to what lies between.
  static constexpr int kMostRuns = 32;
  void StartRuns() { runs_ = 0; }
  std::vector<double> RunMs();
  std::vector<double> GapMs();

  // The model's keys and values, as WriteKv has met them.
  const std::vector<KvLayer>& kv() const { return kv_; }

  std::string Description() const override { return timed_->Description(); }
  BackendStats stats() const override { return timed_->stats(); }
  int64_t FreeBytes() const override { return timed_->FreeBytes(); }
  bool ReadsHostMemory() const override { return timed_->ReadsHostMemory(); }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override { return timed_->Allocate(bytes); }
  void Upload(Tensor target, const void* source) override;
  void Download(void* target, Tensor source) override;
  void Synchronize() override { timed_->Synchronize(); }
  absl::StatusOr<std::unique_ptr<Communicator>> JoinGroup(std::unique_ptr<Communicator> host) override {
    return timed_->JoinGroup(std::move(host));
  }
  bool RunsAhead() const override { return timed_->RunsAhead(); }
  uint64_t Mark() override { return timed_->Mark(); }
  void Await(uint64_t mark) override { timed_->Await(mark); }
  void Run(uint64_t key, absl::FunctionRef<void()> ops) override;
  void Stamp(int event) override { timed_->Stamp(event); }
  double ElapsedMs(int from, int to) override { return timed_->ElapsedMs(from, to); }
  void Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate,
             Tensor drawn) override;
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
  void Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates,
            const DrawDetails& details) override;
  void ReadAll(Tensor memory) override { timed_->ReadAll(memory); }
  void Add(Tensor x, Tensor y) override;
  void GatherRows(Tensor y, Tensor x, Tensor ids) override;

 private:
  template <typename Op>
  void Time(StepPart part, Op&& op);

  const std::unique_ptr<Backend> timed_;
  bool on_ = false;
  int runs_ = kMostRuns;  // stamped since StartRuns: run i begins at stamp 2 i and ends at the next
  std::array<double, kStepParts> seconds_{};
  absl::flat_hash_map<const void*, StepPart> parts_;  // of the product with the weights at that address
  std::vector<KvLayer> kv_;
};

}  // namespace dejavu

#endif  // TESTS_BENCH_TIMED_BACKEND_H_
