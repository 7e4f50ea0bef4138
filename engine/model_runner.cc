#include "engine/model_runner.h"

#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/device.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int32_t kBlockTokens = 16;

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> ModelRunner::Create(const Options& options, const LoadProgress& progress) {
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  if (options.window < 2 || options.window > config.context) {
    return absl::InvalidArgumentError(absl::StrCat("the window is ", options.window, "; it must be in 2 ... ",
                                                   config.context, ", the model's context"));
  }
  std::unique_ptr<ModelRunner> runner(new ModelRunner(options, config));
  ASSIGN_OR_RETURN(runner->backend_, CreateDevice(options.device, options.threads, options.pin));
  if (options.wrap_backend) runner->backend_ = options.wrap_backend(std::move(runner->backend_));
  ASSIGN_OR_RETURN(runner->loaded_,
                   LoadModel({options.model, options.weights, options.predictor}, config, *runner->backend_, progress));
  const int32_t blocks = (options.window + kBlockTokens - 1) / kBlockTokens;
  ASSIGN_OR_RETURN(const DType kv_dtype, ParseKvType(options.kv_dtype));
  ASSIGN_OR_RETURN(runner->kv_, KvCache::Create(*runner->backend_, config, blocks * options.slots, kBlockTokens,
                                                kv_dtype, config.heads));
  runner->batch_ = std::make_unique<Batch>(options.max_rows, options.max_rows, options.slots, blocks);
  std::iota(runner->batch_->block_table.begin(), runner->batch_->block_table.end(), 0);
  runner->logits_.resize(static_cast<size_t>(options.max_rows) * config.vocab);
  RETURN_IF_ERROR(runner->SetPredictor(runner->predictor_data()));
  return runner;
}

absl::Status ModelRunner::SetPredictor(const PredictorData* data) {
  model_.reset();
  predictor_.reset();
  ASSIGN_OR_RETURN(predictor_,
                   Predictor::Create(data, config_, loaded_.shard, *backend_, options_.max_rows, options_.max_audits));
  ASSIGN_OR_RETURN(model_, OptModel::Create(config_, loaded_.weights, *backend_, *communicator_, *predictor_, *batch_));
  counts_ = predictor_->MakeCounts();
  return absl::OkStatus();
}

Batch& ModelRunner::StartBatch() {
  batch_->Clear();
  return *batch_;
}

absl::Span<const float> ModelRunner::Run() {
  model_->Forward(*batch_, kv_, logits_.data(), &counts_);
  return absl::MakeConstSpan(logits_.data(), batch_->logit_rows.size() * config_.vocab);
}

}  // namespace dejavu
