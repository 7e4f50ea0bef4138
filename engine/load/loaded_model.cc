#include "engine/load/loaded_model.h"

#include <unistd.h>

#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "engine/load/synthetic/generator.h"
#include "engine/model/predictor_file.h"
#include "engine/model/weights_file.h"
#include "engine/model/weights_hash.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

// A file holds stage A, which every rank needs, and stage B, thresholds and worth, of which it takes its share.
int64_t ShareOfPredictor(int64_t bytes, const OptConfig& config, const Shard& shard) {
  const double share = static_cast<double>(config.hidden + shard.neuron_count) / (config.hidden + config.ffn);
  return static_cast<int64_t>(static_cast<double>(bytes) * share);
}

}  // namespace

absl::StatusOr<std::optional<DType>> ParseWeights(const std::string& name) {
  if (name == "stored") return std::optional<DType>();
  if (name == "fp32") return DType::kFloat32;
  if (name == "fp16") return DType::kFloat16;
  if (name == "bf16") return DType::kBFloat16;
  if (name == "int8") return DType::kInt8;
  return absl::InvalidArgumentError(
      absl::StrCat("weights is '", name, "'; it must be stored, fp32, fp16, bf16 or int8"));
}

std::string PredictorPath(const ModelOptions& options) {
  if (options.predictor == "none") return "";
  if (!options.predictor.empty()) return options.predictor;
  const std::string beside = absl::StrCat(options.model, "/predictor.safetensors");
  return access(beside.c_str(), F_OK) == 0 ? beside : "";
}

absl::StatusOr<OptConfig> LoadModelConfig(const std::string& model) {
  if (!IsSynthetic(model)) return OptConfig::Load(model);
  ASSIGN_OR_RETURN(const SyntheticModel synthetic, ParseSynthetic(model));
  return synthetic.config;
}

absl::StatusOr<ModelBytes> MeasureModel(const ModelOptions& options, const OptConfig& config) {
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseWeights(options.weights));
  DType in_memory = dtype.value_or(DType::kBFloat16);
  // Which neurons a rank owns makes no difference here.
  ASSIGN_OR_RETURN(const Shard shard, MakeShard(config, nullptr, options.rank, options.ranks));
  ModelBytes bytes;
  std::string predictor = PredictorPath(options);
  if (IsSynthetic(options.model)) {
    const SyntheticBytes synthetic = BytesOf(config, shard, dtype.value_or(DType::kBFloat16));
    bytes.weights = synthetic.weights;
    if (options.predictor.empty()) {
      bytes.predictor = synthetic.predictor;
      predictor.clear();
    }
  } else {
    ASSIGN_OR_RETURN(const std::optional<WeightsFile> converted, WeightsFile::Open(options.model, config));
    if (converted.has_value()) {
      ASSIGN_OR_RETURN(bytes.weights, converted->Measure(shard, dtype));
      in_memory = dtype.value_or(converted->dtype());
    } else {
      ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options.model));
      ASSIGN_OR_RETURN(bytes.weights, OptWeights::Measure(checkpoint, config, shard, dtype));
    }
  }
  std::error_code error;
  const auto size = predictor.empty() ? 0 : std::filesystem::file_size(predictor, error);
  const bool predicted = bytes.predictor > 0 || !predictor.empty();
  if (predicted && in_memory != DType::kInt8) bytes.drafts = DraftWeights::Measure(config, shard);
  if (!error) bytes.predictor += ShareOfPredictor(static_cast<int64_t>(size), config, shard);
  return bytes;
}

absl::StatusOr<LoadedModel> LoadModel(const ModelOptions& options, const OptConfig& config, Backend& backend,
                                      const LoadProgress& progress) {
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseWeights(options.weights));
  std::optional<SyntheticModel> synthetic;
  std::optional<WeightsFile> converted;
  std::optional<Checkpoint> checkpoint;
  LoadedModel model;
  if (IsSynthetic(options.model)) {
    ASSIGN_OR_RETURN(synthetic, ParseSynthetic(options.model));
    model.synthetic = synthetic->Description();
    model.weights_hash = synthetic->Fingerprint();
  } else {
    ASSIGN_OR_RETURN(converted, WeightsFile::Open(options.model, config));
    if (converted.has_value()) {
      model.weights_hash = converted->weights_hash();
    } else {
      ASSIGN_OR_RETURN(checkpoint, Checkpoint::Open(options.model));
      ASSIGN_OR_RETURN(model.weights_hash, WeightsHash(*checkpoint, config));
    }
  }
  const bool generated = synthetic.has_value() && options.predictor.empty();
  model.predictor_path = generated ? kGeneratedPredictor : PredictorPath(options);
  if (generated) {
    model.predictor = StartPredictor(*synthetic);
  } else if (!model.predictor_path.empty()) {
    ASSIGN_OR_RETURN(model.predictor, ReadPredictor(model.predictor_path, config, model.weights_hash));
  }
  ASSIGN_OR_RETURN(model.shard, MakeShard(config, model.predictor.has_value() ? &*model.predictor : nullptr,
                                          options.rank, options.ranks));
  // The drafts' weights are a part of the whole.
  const bool drafts = options.draft_weights && model.predictor.has_value();
  const int64_t draft_bytes = drafts ? DraftWeights::Measure(config, model.shard) : 0;
  int64_t before = 0;
  LoadProgress part;
  if (progress) {
    part = [&](int64_t done, int64_t total) {
      before = total;
      return progress(done, total + draft_bytes);
    };
  }
  if (synthetic.has_value()) {
    ASSIGN_OR_RETURN(model.weights, GenerateModel(*synthetic, model.shard, dtype.value_or(DType::kBFloat16), backend,
                                                  part, generated ? &*model.predictor : nullptr));
  } else if (converted.has_value()) {
    ASSIGN_OR_RETURN(model.weights, converted->Load(model.shard, backend, part, dtype, options.map_weights));
  } else {
    ASSIGN_OR_RETURN(model.weights, OptWeights::Load(*checkpoint, config, model.shard, backend, part, dtype));
  }
  if (drafts && model.weights.dtype() != DType::kInt8) {
    const auto of_drafts = [&](int64_t done, int64_t total) {
      return !progress || progress(before + done * draft_bytes / total, before + draft_bytes);
    };
    ASSIGN_OR_RETURN(model.drafts, DraftWeights::Create(model.weights, backend, of_drafts));
  }
  return model;
}

}  // namespace dejavu
