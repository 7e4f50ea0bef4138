// The file of a PredictorData. One safetensors file holds everything; what is not a tensor is JSON in its metadata
// under kPredictorMetadataKey. Any thread.
#ifndef ENGINE_MODEL_PREDICTOR_FILE_H_
#define ENGINE_MODEL_PREDICTOR_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/model/predictor_data.h"
#include "engine/model_shape.h"

namespace dejavu {

inline constexpr char kPredictorMetadataKey[] = "dejavu.predictor";
inline constexpr int kPredictorVersion = 1;

// "layers.3.worth".
std::string PredictorTensorName(int32_t layer, absl::string_view name);

// Written beside `path` first and then renamed.
absl::Status WritePredictor(const PredictorData& data, const ModelShape& shape, const std::string& path);

// INVALID_ARGUMENT with the path and the reason for a file that is damaged, of another version, not finite, or of
// another shape than the model; FAILED_PRECONDITION where its hash differs from `weights_hash`.
absl::StatusOr<PredictorData> ReadPredictor(const std::string& path, const ModelShape& shape,
                                            const std::string& weights_hash);

// The same without matrices, thresholds and worth, for whatever weights it was made: ranks, densities, frequencies.
absl::StatusOr<PredictorData> ReadPredictorOutline(const std::string& path, const ModelShape& shape);

}  // namespace dejavu

#endif  // ENGINE_MODEL_PREDICTOR_FILE_H_
