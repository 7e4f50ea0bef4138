#include "engine/planning/planned_model.h"

#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/generator.h"
#include "engine/model/predictor_file.h"
#include "engine/model/weight_names.h"
#include "engine/model/weights_file.h"
#include "engine/planning/calibrated_reads.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

OptConfig ShapeOf350m() {
  OptConfig config;
  config.hidden = 1024;
  config.layers = 24;
  config.heads = 16;
  config.head_dim = 64;
  config.ffn = 4096;
  config.vocab = 50272;
  config.context = 2048;
  config.embed = 512;
  config.pre_norm = config.final_norm = false;
  return config;
}

// Not among the synthetic models, which have no projections; like the other small ones it takes 6.7b's densities.
constexpr char kName350m[] = "opt-350m";

absl::StatusOr<SyntheticModel> NamedModel(const std::string& name) {
  absl::StatusOr<SyntheticModel> model = ParseSynthetic(name == kName350m ? "opt-125m" : name);
  if (!model.ok() && !IsSynthetic(name)) {
    return absl::NotFoundError(
        absl::StrCat(name, ": there is no such directory, nor a model of this name: ", model.status().message()));
  }
  if (!model.ok() || name != kName350m) return model;
  model->name = name;
  model->config = ShapeOf350m();
  return model;
}

// The matrices' type, and whether the head is one of its own.
absl::Status TakeFromWeights(const std::string& directory, std::optional<DType> dtype, PlannedModel* model) {
  ASSIGN_OR_RETURN(const std::optional<WeightsFile> converted, WeightsFile::Open(directory, model->config));
  if (converted.has_value()) {
    RETURN_IF_ERROR(converted->CheckType(dtype));
    model->converted = converted->dtype();
    model->stored = converted->position_dtype();
    model->config.tied = !converted->has_own_head();
    return absl::OkStatus();
  }
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(directory);
  if (absl::IsNotFound(checkpoint.status())) return absl::OkStatus();
  if (!checkpoint.ok()) return checkpoint.status();
  ASSIGN_OR_RETURN(const WeightNames::Ends ends, WeightNames(*checkpoint, model->config).FindEnds());
  model->stored = ends.embedding->dtype;
  model->config.tied = ends.head == nullptr;
  return absl::OkStatus();
}

absl::Status TakeFromFile(const std::string& path, PlannedModel* model) {
  ASSIGN_OR_RETURN(model->predictor, ReadPredictorOutline(path, model->config));
  model->densities = absl::StrCat("counted by the calibration of ", path, "; unions of independent tokens");
  model->reads = CalibratedReads(*model->predictor, model->batches);
  return absl::OkStatus();
}

void TakePublished(const SyntheticModel& named, bool predicts, PlannedModel* model) {
  if (predicts) model->predictor = PredictorOutline(named);
  model->densities =
      absl::StrCat("published for ", DensitySource(named), " (Polar Sparsity), as in the synthetic models");
  model->reads = ExpectedReads(named, model->batches);
}

void TakeDense(PlannedModel* model) {
  model->densities = "unknown without a predictor: DENSE alone";
  for (auto& tier : model->reads) tier.assign(model->config.layers, std::vector<LayerReads>(model->batches.size()));
}

}  // namespace

absl::StatusOr<PlannedModel> DescribeModel(const EngineOptions& options, Tier highest, Tier lowest) {
  PlannedModel model;
  for (int batch = 1; batch <= options.scheduler.max_batch; batch *= 2) model.batches.push_back(batch);
  std::string predictor = options.predictor == "none" ? "" : options.predictor;
  if (!IsSynthetic(options.model) && access(options.model.c_str(), F_OK) == 0) {
    model.name = options.model;
    ASSIGN_OR_RETURN(model.config, OptConfig::Load(options.model));
    ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseWeights(options.weights));
    RETURN_IF_ERROR(TakeFromWeights(options.model, dtype, &model));
    predictor = PredictorPath({options.model, options.weights, options.predictor});
    if (predictor.empty()) {
      TakeDense(&model);
    } else {
      RETURN_IF_ERROR(TakeFromFile(predictor, &model));
    }
  } else {
    ASSIGN_OR_RETURN(const SyntheticModel named, NamedModel(options.model));
    model.name = named.name;
    model.config = named.config;
    model.stored = IsSynthetic(options.model) ? DType::kBFloat16 : DType::kFloat16;
    if (predictor.empty()) {
      TakePublished(named, options.predictor != "none", &model);
    } else {
      RETURN_IF_ERROR(TakeFromFile(predictor, &model));
    }
    model.synthetic = predictor.empty();
  }
  model.tiers = {Tier::kDense};
  if (model.synthetic || model.predictor.has_value()) model.tiers.push_back(Tier::kExact);
  if (model.predictor.has_value()) {
    model.tiers.insert(model.tiers.end(), model.predictor->tiers.begin(), model.predictor->tiers.end());
  }
  const auto unwanted = [&](Tier tier) { return tier < highest || tier > lowest; };
  model.tiers.erase(std::remove_if(model.tiers.begin(), model.tiers.end(), unwanted), model.tiers.end());
  return model;
}

}  // namespace dejavu
