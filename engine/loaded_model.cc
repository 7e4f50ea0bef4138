#include "engine/loaded_model.h"

#include <unistd.h>

#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/checkpoint.h"
#include "engine/synthetic.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

// Empty: none.
std::string PredictorPath(const ModelOptions& options) {
  if (options.predictor == "none") return "";
  if (!options.predictor.empty()) return options.predictor;
  const std::string beside = absl::StrCat(options.model, "/predictor.safetensors");
  return access(beside.c_str(), F_OK) == 0 ? beside : "";
}

absl::StatusOr<LoadedModel> WithPredictor(LoadedModel model, const OptConfig& config) {
  if (model.predictor_path.empty()) return model;
  ASSIGN_OR_RETURN(model.predictor, ReadPredictor(model.predictor_path, config, model.weights_hash));
  return model;
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

absl::StatusOr<OptConfig> LoadModelConfig(const std::string& model) {
  if (!IsSynthetic(model)) return OptConfig::Load(model);
  ASSIGN_OR_RETURN(const SyntheticModel synthetic, ParseSynthetic(model));
  return synthetic.config;
}

absl::StatusOr<ModelBytes> MeasureModel(const ModelOptions& options, const OptConfig& config) {
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseWeights(options.weights));
  ModelBytes bytes;
  std::string predictor = PredictorPath(options);
  if (IsSynthetic(options.model)) {
    const SyntheticBytes synthetic = BytesOf(config, dtype.value_or(DType::kBFloat16));
    bytes.weights = synthetic.weights;
    if (options.predictor.empty()) {
      bytes.predictor = synthetic.predictor;
      predictor.clear();
    }
  } else {
    ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options.model));
    for (const auto& [name, tensor] : checkpoint.tensors()) {
      if (absl::EndsWith(name, "lm_head.weight")) continue;  // the token embedding again
      const bool converted = dtype.has_value() && tensor.shape.size() == 2;
      bytes.weights += tensor.elements * SizeOf(converted ? *dtype : tensor.dtype);
    }
  }
  std::error_code error;
  const auto size = predictor.empty() ? 0 : std::filesystem::file_size(predictor, error);
  if (!error) bytes.predictor += static_cast<int64_t>(size);
  return bytes;
}

absl::StatusOr<LoadedModel> LoadModel(const ModelOptions& options, const OptConfig& config, Backend& backend,
                                      const LoadProgress& progress) {
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseWeights(options.weights));
  LoadedModel model;
  if (IsSynthetic(options.model)) {
    ASSIGN_OR_RETURN(const SyntheticModel synthetic, ParseSynthetic(options.model));
    ASSIGN_OR_RETURN(model, GenerateModel(synthetic, dtype.value_or(DType::kBFloat16), backend, progress));
    model.predictor_path = options.predictor.empty() ? "generated" : PredictorPath(options);
    if (options.predictor.empty()) return model;
    model.predictor.reset();
    return WithPredictor(std::move(model), config);
  }
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options.model));
  ASSIGN_OR_RETURN(model.weights, OptWeights::Load(checkpoint, config, backend, progress, dtype));
  ASSIGN_OR_RETURN(model.weights_hash, WeightsHash(checkpoint, config));
  model.predictor_path = PredictorPath(options);
  return WithPredictor(std::move(model), config);
}

}  // namespace dejavu
