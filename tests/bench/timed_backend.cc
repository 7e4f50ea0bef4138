#include "tests/bench/timed_backend.h"

#include "kernels/base/clock.h"

namespace dejavu {

void TimedBackend::SetWeights(const OptWeights& weights) {
  parts_.clear();
  for (const LayerWeights& layer : weights.layers) {
    const Tensor& qkv = layer.qkv.weight;
    const int64_t hidden = qkv.rows / 3;
    parts_[qkv.data] = StepPart::kProjections;
    parts_[qkv.Rows(hidden, hidden).data] = StepPart::kProjections;  // K and V, where heads are chosen
    parts_[layer.out.weight.data] = StepPart::kProjections;
  }
  for (const LinearWeights* w : {&weights.head, &weights.project_in, &weights.project_out}) {
    if (!w->weight.empty()) parts_[w->weight.data] = StepPart::kHead;
  }
}

void TimedBackend::Start() {
  seconds_.fill(0.0);
  on_ = true;
}

template <typename Op>
void TimedBackend::Time(StepPart part, Op&& op) {
  if (!on_) return op();
  const SteadyTime start = std::chrono::steady_clock::now();
  op();
  seconds_[static_cast<size_t>(part)] += SecondsSince(start);
}

void TimedBackend::Upload(Tensor target, const void* source) {
  Time(StepPart::kRest, [&] { timed_->Upload(target, source); });
}

void TimedBackend::Download(void* target, Tensor source) {
  Time(StepPart::kRest, [&] { timed_->Download(target, source); });
}

void TimedBackend::Run(uint64_t key, absl::FunctionRef<void()> ops) {
  if (runs_ == kMostRuns) return timed_->Run(key, ops);
  timed_->Stamp(2 * runs_);
  timed_->Run(key, ops);
  timed_->Stamp(2 * runs_ + 1);
  ++runs_;
}

std::vector<double> TimedBackend::RunMs() {
  std::vector<double> ms;
  for (int i = 0; i < runs_; ++i) ms.push_back(timed_->ElapsedMs(2 * i, 2 * i + 1));
  return ms;
}

std::vector<double> TimedBackend::GapMs() {
  std::vector<double> ms;
  for (int i = 1; i < runs_; ++i) ms.push_back(timed_->ElapsedMs(2 * i - 1, 2 * i));
  return ms;
}

void TimedBackend::Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate,
                         Tensor drawn) {
  Time(StepPart::kRest, [&] { timed_->Embed(y, ids, table, offset, accumulate, drawn); });
}

void TimedBackend::LayerNorm(Tensor y, Tensor x, const NormWeights& norm) {
  Time(StepPart::kRest, [&] { timed_->LayerNorm(y, x, norm); });
}

void TimedBackend::Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                          const Ride& ride) {
  const auto known = parts_.find(w.weight.data);
  Time(known == parts_.end() ? StepPart::kPredictor : known->second,
       [&] { timed_->Linear(y, x, w, selected, group, ride); });
}

void TimedBackend::WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) {
  if (kv_.empty() || kv_.front().keys != kv.keys) {
    bool known = false;
    for (const KvLayer& layer : kv_) known = known || layer.keys == kv.keys;
    if (!known) kv_.push_back(kv);
  }
  Time(StepPart::kAttention, [&] { timed_->WriteKv(kv, qkv, rows); });
}

void TimedBackend::Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                             const Selection& heads) {
  Time(StepPart::kAttention, [&] { timed_->Attention(context, qkv, kv, rows, scale, heads); });
}

void TimedBackend::Select(const Selection& selection, Tensor counts, Tensor a, const SelectorWeights& w,
                          Tensor points) {
  Time(StepPart::kSelection, [&] { timed_->Select(selection, counts, a, w, points); });
}

void TimedBackend::Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, bool skip_zeros,
                       Tensor hidden, Tensor active) {
  Time(StepPart::kMlp, [&] { timed_->Mlp(y, x, w, neurons, skip_zeros, hidden, active); });
}

void TimedBackend::Audit(Tensor result, Tensor x, const LinearWeights& up, Tensor worth, const Selection& neurons,
                         Tensor hidden) {
  Time(StepPart::kRest, [&] { timed_->Audit(result, x, up, worth, neurons, hidden); });
}

void TimedBackend::Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates,
                        const DrawDetails& details) {
  Time(StepPart::kRest, [&] { timed_->Draw(tokens, bests, logits, draws, candidates, details); });
}

void TimedBackend::Add(Tensor x, Tensor y) {
  Time(StepPart::kRest, [&] { timed_->Add(x, y); });
}

void TimedBackend::GatherRows(Tensor y, Tensor x, Tensor ids) {
  Time(StepPart::kRest, [&] { timed_->GatherRows(y, x, ids); });
}

}  // namespace dejavu
