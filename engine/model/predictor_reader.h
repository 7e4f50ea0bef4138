// PredictorReader: reads and checks one predictor file, for ReadPredictor and ReadPredictorOutline (predictor_file.h),
// its only callers. One thread.
#ifndef ENGINE_MODEL_PREDICTOR_READER_H_
#define ENGINE_MODEL_PREDICTOR_READER_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "engine/model/predictor_data.h"
#include "engine/model_shape.h"
#include "nlohmann/json.hpp"

namespace dejavu {

class PredictorReader {
 public:
  PredictorReader(std::string path, const ModelShape& shape, bool outline)
      : path_(std::move(path)), shape_(shape), outline_(outline) {}

  absl::StatusOr<PredictorData> Read();

 private:
  template <typename... Parts>
  absl::Status Refuse(const Parts&... parts) const {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": ", parts...));
  }
  absl::Status CheckModel(const nlohmann::json& metadata) const;
  absl::Status ReadMetadata(const nlohmann::json& metadata, PredictorData* data) const;
  absl::Status ReadLayer(const nlohmann::json& json, int32_t l, const std::vector<Tier>& tiers,
                         LayerPredictorData* layer) const;
  absl::Status ReadSelector(const nlohmann::json& json, const std::string& at, int32_t outputs,
                            const std::vector<Tier>& tiers, SelectorData* selector) const;
  absl::Status ReadPoint(const nlohmann::json& json, const std::string& name, int32_t outputs, int32_t rank,
                         OperatingPoint* point) const;
  absl::StatusOr<int64_t> Integer(const nlohmann::json& json, const char* key, int64_t least, int64_t most) const;
  absl::StatusOr<double> Share(const nlohmann::json& json, const char* key) const;
  // Leaves `values` empty in an outline, unless it belongs there.
  template <typename T>
  absl::Status ReadTensor(const std::string& name, std::vector<int64_t> shape, std::vector<T>* values,
                          bool of_outline = false) const;
  absl::Status CheckFinite(const std::string& name, const std::vector<float>& values) const;

  const std::string path_;
  const ModelShape& shape_;
  const bool outline_;
  TensorMap tensors_;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_PREDICTOR_READER_H_
