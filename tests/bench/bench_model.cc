#include "tests/bench/bench_model.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

constexpr int kSlotsOfTheirOwn = 4;

}  // namespace

const char* WeightsName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "fp32";
    case DType::kFloat16:
      return "fp16";
    case DType::kBFloat16:
      return "bf16";
    default:
      return "int8";
  }
}

absl::StatusOr<std::vector<int32_t>> BenchTokens(const std::string& model, const std::string& text, int64_t wanted) {
  if (!text.empty()) {
    ASSIGN_OR_RETURN(std::vector<int32_t> tokens, ReadTokens(model, text, 0));
    if (static_cast<int64_t>(tokens.size()) < wanted) {
      return absl::InvalidArgumentError(
          absl::StrCat(text, ": has ", tokens.size(), " tokens; the sequences need ", wanted));
    }
    tokens.resize(wanted);
    return tokens;
  }
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(model));
  std::mt19937 random(1);
  std::uniform_int_distribution<int32_t> any(0, config.vocab - 1);
  std::vector<int32_t> tokens(wanted);
  for (int32_t& token : tokens) token = any(random);
  return tokens;
}

bool Serves(const PredictorData* predictor, Tier tier) {
  if (!IsPredicted(tier)) return true;
  return predictor != nullptr && std::count(predictor->tiers.begin(), predictor->tiers.end(), tier) > 0;
}

absl::Status CheckServes(const std::string& model, const PredictorData* predictor, Tier tier) {
  if (Serves(predictor, tier)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(model, ": has no predictor for tier ", Name(tier)));
}

absl::StatusOr<std::unique_ptr<BenchModel>> BenchModel::Create(ModelRunner::Options options, const std::string& text,
                                                               ProgressLine& progress) {
  std::unique_ptr<BenchModel> model(new BenchModel);
  model->synthetic_ = IsSynthetic(options.model);
  model->window_ = options.window;
  ASSIGN_OR_RETURN(model->tokens_, BenchTokens(options.model, text, int64_t{options.window} * options.slots));
  options.wrap_backend = [&model, wrap = options.wrap_backend](std::unique_ptr<Backend> backend) {
    if (wrap) backend = wrap(std::move(backend));
    auto timed = std::make_unique<TimedBackend>(std::move(backend));
    model->timed_ = timed.get();
    return timed;
  };
  ASSIGN_OR_RETURN(model->runner_, ModelRunner::Create(options, ShowProgress(progress, "loading")));
  model->timed_->SetWeights(model->runner_->weights());
  RETURN_IF_ERROR(model->PrepareCopies());
  return model;
}

absl::Status BenchModel::PrepareCopies() {
  std::vector<int32_t> numbers(runner_->options().window * runner_->config().heads);  // more than a slot has rows
  std::iota(numbers.begin(), numbers.end(), 0);
  const auto count = static_cast<int64_t>(numbers.size());
  ASSIGN_OR_RETURN(numbers_, timed_->Allocate(count * int64_t{sizeof(int32_t)}));
  timed_->Upload(numbers_.View(0, DType::kInt32, 1, count), numbers.data());
  return absl::OkStatus();
}

double BenchModel::Prefill(int slot, int first, int count) {
  Batch& rows = runner_->StartBatch();
  for (int i = first; i < first + count; ++i) rows.AddRow(slot, i, TokenAt(slot, i), i + 1 == first + count);
  const SteadyTime start = std::chrono::steady_clock::now();
  runner_->Run();
  return SecondsSince(start);
}

void BenchModel::FillContext(int context, ProgressLine& progress) {
  const int slots = runner_->options().slots;
  const int own = synthetic_ ? std::min(slots, kSlotsOfTheirOwn) : slots;
  const int from = std::min(filled_, context), todo = (context - from) * own;
  int done = 0;
  for (int slot = 0; slot < own && !Interrupted(); ++slot) {
    for (int first = from; first < context && !Interrupted();) {
      const int count = std::min(context - first, runner_->options().max_rows);
      Prefill(slot, first, count);
      first += count;
      done += count;
      progress.Show(absl::StrCat("context ", context), static_cast<double>(done) / todo);
    }
  }
  for (int slot = own; slot < slots; ++slot) CopySlot(slot, slot % own);
  filled_ = context;
}

// A slot's blocks follow each other in the storage; a head's part of a block is a row here, copied as if it were
// float32.
void BenchModel::CopySlot(int target, int source) {
  for (const KvLayer& kv : timed_->kv()) {
    const int64_t rows = int64_t{kv.blocks} / runner_->options().slots * kv.heads;
    const int64_t row_floats = int64_t{kv.block_tokens} * kv.head_dim * SizeOf(kv.dtype) / int64_t{sizeof(float)};
    for (void* base : {kv.keys, kv.values}) {
      const Tensor all = {base, DType::kFloat32, rows * runner_->options().slots, row_floats, row_floats};
      timed_->GatherRows(all.Rows(target * rows, rows), all.Rows(source * rows, rows),
                         numbers_.View(0, DType::kInt32, 1, rows));
    }
  }
}

}  // namespace dejavu
