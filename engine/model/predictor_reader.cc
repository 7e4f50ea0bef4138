#include "engine/model/predictor_reader.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "absl/strings/str_join.h"
#include "engine/formats/json_text.h"
#include "engine/model/predictor_file.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

using Json = nlohmann::json;

template <typename T>
const char* TypeName();
template <>
const char* TypeName<float>() {
  return "float32";
}
template <>
const char* TypeName<int8_t>() {
  return "int8";
}
template <>
const char* TypeName<uint16_t>() {
  return "float16";
}

const Json& Member(const Json& json, const char* key) {
  static const Json nothing;
  const auto found = json.is_object() ? json.find(key) : json.end();
  return found == json.end() ? nothing : *found;
}

}  // namespace

absl::StatusOr<int64_t> PredictorReader::Integer(const Json& json, const char* key, int64_t least, int64_t most) const {
  const Json& value = Member(json, key);
  if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(most) ||
      value.get<int64_t>() < least) {
    return Refuse("\"", key, "\" is ", value.dump(), "; it must be an integer in ", least, " ... ", most);
  }
  return value.get<int64_t>();
}

absl::StatusOr<double> PredictorReader::Share(const Json& json, const char* key) const {
  const Json& value = Member(json, key);
  if (!value.is_number() || !(value.get<double>() >= 0.0 && value.get<double>() <= 1.0)) {
    return Refuse("\"", key, "\" is ", value.dump(), "; it must be a number in 0 ... 1");
  }
  return value.get<double>();
}

template <typename T>
absl::Status PredictorReader::ReadTensor(const std::string& name, std::vector<int64_t> shape, std::vector<T>* values,
                                         bool of_outline) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) return Refuse("tensor ", name, " is missing");
  const StoredTensor& tensor = found->second;
  if (std::string(Name(tensor.dtype)) != TypeName<T>()) {
    return Refuse("tensor ", name, " is ", Name(tensor.dtype), ", not ", TypeName<T>());
  }
  if (tensor.shape != shape) {
    return Refuse("tensor ", name, " has shape [", absl::StrJoin(tensor.shape, ", "), "]; the model implies [",
                  absl::StrJoin(shape, ", "), "]");
  }
  if (outline_ && !of_outline) return absl::OkStatus();
  values->resize(tensor.elements);
  return Checkpoint::Read(tensor, 0, tensor.elements, values->data());
}

absl::Status PredictorReader::CheckFinite(const std::string& name, const std::vector<float>& values) const {
  for (const float value : values) {
    if (!std::isfinite(value)) return Refuse("tensor ", name, " holds values that are not finite (NaN or infinity)");
  }
  return absl::OkStatus();
}

absl::Status PredictorReader::CheckModel(const Json& metadata) const {
  const std::pair<const char*, int32_t> wanted[] = {
      {"layers", shape_.layers}, {"hidden", shape_.hidden}, {"heads", shape_.heads}, {"ffn", shape_.ffn}};
  for (const auto& [key, value] : wanted) {
    ASSIGN_OR_RETURN(const int64_t stored, Integer(metadata, key, 0, INT32_MAX));
    if (stored != value) return Refuse("was made for a model with ", key, " = ", stored, "; this one has ", value);
  }
  return absl::OkStatus();
}

absl::Status PredictorReader::ReadPoint(const Json& json, const std::string& name, int32_t outputs, int32_t rank,
                                        OperatingPoint* point) const {
  ASSIGN_OR_RETURN(const int64_t point_rank, Integer(json, "rank", 1, rank));
  point->rank = static_cast<int32_t>(point_rank);
  ASSIGN_OR_RETURN(point->missed_mass, Share(json, "missed_mass"));
  ASSIGN_OR_RETURN(point->missed_share, Share(json, "missed_share"));
  ASSIGN_OR_RETURN(point->density, Share(json, "density"));
  std::vector<uint16_t> bits;
  RETURN_IF_ERROR(ReadTensor(name, {outputs}, &bits));
  point->thresholds.resize(bits.size());
  std::transform(bits.begin(), bits.end(), point->thresholds.begin(), FloatFromFloat16);
  for (const float threshold : point->thresholds) {
    if (std::isnan(threshold)) return Refuse("tensor ", name, " holds NaN");
  }
  return absl::OkStatus();
}

absl::Status PredictorReader::ReadSelector(const Json& json, const std::string& at, int32_t outputs,
                                           const std::vector<Tier>& tiers, SelectorData* selector) const {
  const absl::Status status = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const int64_t rank, Integer(json, "rank", 0, std::max(shape_.hidden, outputs)));
    selector->rank = static_cast<int32_t>(rank);
    if (rank == 0) return absl::OkStatus();
    RETURN_IF_ERROR(ReadTensor(at + ".a", {rank, shape_.hidden}, &selector->a));
    RETURN_IF_ERROR(ReadTensor(at + ".a_scale", {rank}, &selector->a_scale));
    RETURN_IF_ERROR(CheckFinite(at + ".a_scale", selector->a_scale));
    RETURN_IF_ERROR(ReadTensor(at + ".b", {rank, outputs}, &selector->b));
    const Json& points = Member(json, "points");
    if (!points.is_object()) return Refuse("\"points\" is missing");
    for (const auto& item : points.items()) {
      const std::optional<Tier> tier = ParseTier(item.key());
      if (!tier.has_value() || std::find(tiers.begin(), tiers.end(), *tier) == tiers.end()) {
        return Refuse("operating point ", Quoted(item.key()), " belongs to no tier of this file");
      }
      RETURN_IF_ERROR(ReadPoint(item.value(), absl::StrCat(at, ".thresholds.", item.key()), outputs, selector->rank,
                                &selector->points[static_cast<size_t>(*tier)].emplace()));
    }
    return absl::OkStatus();
  }();
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(status.message(), " (", at, ")"));
}

absl::Status PredictorReader::ReadLayer(const Json& json, int32_t l, const std::vector<Tier>& tiers,
                                        LayerPredictorData* layer) const {
  const Json& tap = Member(json, "tap");
  const std::optional<Tap> parsed = tap.is_string() ? ParseTap(tap.get<std::string>()) : std::nullopt;
  if (!parsed.has_value() || (l == 0 && *parsed == Tap::kPreviousLayer)) {
    return Refuse("layer ", l, " has tap ", tap.dump());
  }
  layer->tap = *parsed;
  RETURN_IF_ERROR(
      ReadSelector(Member(json, "neurons"), PredictorTensorName(l, "neurons"), shape_.ffn, tiers, &layer->neurons));
  RETURN_IF_ERROR(
      ReadSelector(Member(json, "heads"), PredictorTensorName(l, "heads"), shape_.heads, tiers, &layer->heads));
  if (layer->tap == Tap::kMlpNorm && layer->heads.rank > 0) {
    return Refuse("layer ", l, " chooses heads from tap ", tap.dump(), ", which comes after its attention");
  }
  RETURN_IF_ERROR(ReadTensor(PredictorTensorName(l, "worth"), {shape_.ffn}, &layer->worth));
  RETURN_IF_ERROR(CheckFinite(PredictorTensorName(l, "worth"), layer->worth));
  for (const float worth : layer->worth) {
    if (worth < 0.0f) return Refuse("tensor ", PredictorTensorName(l, "worth"), " holds negative values");
  }
  RETURN_IF_ERROR(
      ReadTensor(PredictorTensorName(l, "frequency"), {shape_.ffn}, &layer->frequency, /*of_outline=*/true));
  return CheckFinite(PredictorTensorName(l, "frequency"), layer->frequency);
}

absl::Status PredictorReader::ReadMetadata(const Json& metadata, PredictorData* data) const {
  RETURN_IF_ERROR(CheckModel(metadata));
  const Json& tap = Member(metadata, "tap");
  const std::optional<Tap> parsed = tap.is_string() ? ParseTap(tap.get<std::string>()) : std::nullopt;
  if (!parsed.has_value()) return Refuse("\"tap\" is ", tap.dump());
  data->tap = *parsed;
  const Json& tiers = Member(metadata, "tiers");
  if (!tiers.is_array()) return Refuse("\"tiers\" is missing");
  for (const Json& name : tiers) {
    const std::optional<Tier> tier = name.is_string() ? ParseTier(name.get<std::string>()) : std::nullopt;
    if (!tier.has_value() || !IsPredicted(*tier)) return Refuse("\"tiers\" holds ", name.dump());
    data->tiers.push_back(*tier);
  }
  const Json& layers = Member(metadata, "per_layer");
  if (!layers.is_array() || layers.size() != static_cast<size_t>(shape_.layers)) {
    return Refuse("\"per_layer\" does not describe ", shape_.layers, " layers");
  }
  data->layers.resize(shape_.layers);
  for (int32_t l = 0; l < shape_.layers; ++l) {
    RETURN_IF_ERROR(ReadLayer(layers[l], l, data->tiers, &data->layers[l]));
  }
  const Json& report = Member(metadata, "report");
  data->report_json = report.is_object() ? report.dump() : "{}";
  const Json& hash = Member(metadata, "weights");
  data->weights_hash = hash.is_string() ? hash.get<std::string>() : "";
  return absl::OkStatus();
}

absl::StatusOr<PredictorData> PredictorReader::Read() {
  ASSIGN_OR_RETURN(FileTensors file, ReadSafetensorsHeader(path_));
  tensors_ = std::move(file.tensors);
  const std::string& text = file.metadata[kPredictorMetadataKey];
  if (text.empty()) return Refuse("is no predictor: its metadata has no \"", kPredictorMetadataKey, "\"");
  ASSIGN_OR_RETURN(const Json metadata, ParseJsonObject(text, path_));
  if (Member(metadata, "version") != kPredictorVersion) {
    return Refuse("has version ", Member(metadata, "version").dump(), "; this build reads version ", kPredictorVersion);
  }
  PredictorData data;
  RETURN_IF_ERROR(ReadMetadata(metadata, &data));
  return data;
}

}  // namespace dejavu
