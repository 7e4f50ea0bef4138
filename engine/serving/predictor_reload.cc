#include "engine/serving/predictor_reload.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "kernels/base/status_macros.h"

namespace dejavu {

absl::StatusOr<PredictorData> ReadPredictorAgain(const ModelGroup& group, const PredictorInfo& loaded,
                                                 const OptConfig& config) {
  const std::string& path = loaded.path;
  if (group.ranks() > 1) {
    return absl::UnimplementedError("a model on several ranks keeps the predictor that was loaded; restart it");
  }
  if (path.empty()) {
    return absl::FailedPreconditionError("no predictor is loaded, and no memory is planned for one; restart with it");
  }
  if (path == kGeneratedPredictor) {
    return absl::FailedPreconditionError("the predictor belongs to the synthetic model; there is no file to read");
  }
  ASSIGN_OR_RETURN(PredictorData data, ReadPredictor(path, config, group.loaded().weights_hash));
  if (data.tiers != loaded.tiers) {
    return absl::FailedPreconditionError(
        absl::StrCat("the predictor ", path, " serves other tiers than the loaded one; restart with it"));
  }
  return data;
}

}  // namespace dejavu
