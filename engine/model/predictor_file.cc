#include "engine/model/predictor_file.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/formats/json_text.h"
#include "engine/formats/safetensors_writer.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

using Json = nlohmann::json;

constexpr int kVersion = 1;

std::string At(int32_t layer, absl::string_view name) { return absl::StrCat("layers.", layer, ".", name); }

// ---- Writing

Json AddSelector(const SelectorData& selector, int32_t hidden, int64_t outputs, const std::string& at,
                 SafetensorsWriter* writer) {
  Json json = {{"rank", selector.rank}, {"points", Json::object()}};
  if (selector.rank == 0) return json;
  writer->Add(at + ".a", {selector.rank, hidden}, selector.a);
  writer->Add(at + ".a_scale", {selector.rank}, selector.a_scale);
  writer->Add(at + ".b", {selector.rank, outputs}, selector.b);
  for (const Tier tier : kAllTiers) {
    const std::optional<OperatingPoint>& point = selector.points[static_cast<size_t>(tier)];
    if (!point.has_value()) continue;
    const std::string name(Name(tier));
    json["points"][name] = {{"rank", point->rank},
                            {"missed_mass", point->missed_mass},
                            {"missed_share", point->missed_share},
                            {"density", point->density}};
    writer->AddAsFloat16(absl::StrCat(at, ".thresholds.", name), {outputs}, point->thresholds);
  }
  return json;
}

// ---- Reading

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

class Reader {
 public:
  Reader(std::string path, const OptConfig& config, bool outline)
      : path_(std::move(path)), config_(config), outline_(outline) {}

  absl::StatusOr<PredictorData> Read();

 private:
  template <typename... Parts>
  absl::Status Refuse(const Parts&... parts) const {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": ", parts...));
  }
  absl::Status CheckModel(const Json& metadata) const;
  absl::Status ReadMetadata(const Json& metadata, PredictorData* data) const;
  absl::Status ReadLayer(const Json& json, int32_t l, const std::vector<Tier>& tiers, LayerPredictorData* layer) const;
  absl::Status ReadSelector(const Json& json, const std::string& at, int32_t outputs, const std::vector<Tier>& tiers,
                            SelectorData* selector) const;
  absl::Status ReadPoint(const Json& json, const std::string& name, int32_t outputs, int32_t rank,
                         OperatingPoint* point) const;
  absl::StatusOr<int64_t> Integer(const Json& json, const char* key, int64_t least, int64_t most) const;
  absl::StatusOr<double> Share(const Json& json, const char* key) const;
  // Leaves `values` empty in an outline, unless it belongs there.
  template <typename T>
  absl::Status ReadTensor(const std::string& name, std::vector<int64_t> shape, std::vector<T>* values,
                          bool of_outline = false) const;
  absl::Status CheckFinite(const std::string& name, const std::vector<float>& values) const;

  const std::string path_;
  const OptConfig& config_;
  const bool outline_;
  TensorMap tensors_;
};

const Json& Member(const Json& json, const char* key) {
  static const Json nothing;
  const auto found = json.is_object() ? json.find(key) : json.end();
  return found == json.end() ? nothing : *found;
}

absl::StatusOr<int64_t> Reader::Integer(const Json& json, const char* key, int64_t least, int64_t most) const {
  const Json& value = Member(json, key);
  if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(most) ||
      value.get<int64_t>() < least) {
    return Refuse("\"", key, "\" is ", value.dump(), "; it must be an integer in ", least, " ... ", most);
  }
  return value.get<int64_t>();
}

absl::StatusOr<double> Reader::Share(const Json& json, const char* key) const {
  const Json& value = Member(json, key);
  if (!value.is_number() || !(value.get<double>() >= 0.0 && value.get<double>() <= 1.0)) {
    return Refuse("\"", key, "\" is ", value.dump(), "; it must be a number in 0 ... 1");
  }
  return value.get<double>();
}

template <typename T>
absl::Status Reader::ReadTensor(const std::string& name, std::vector<int64_t> shape, std::vector<T>* values,
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

absl::Status Reader::CheckFinite(const std::string& name, const std::vector<float>& values) const {
  for (const float value : values) {
    if (!std::isfinite(value)) return Refuse("tensor ", name, " holds values that are not finite (NaN or infinity)");
  }
  return absl::OkStatus();
}

absl::Status Reader::CheckModel(const Json& metadata) const {
  const std::pair<const char*, int32_t> wanted[] = {
      {"layers", config_.layers}, {"hidden", config_.hidden}, {"heads", config_.heads}, {"ffn", config_.ffn}};
  for (const auto& [key, value] : wanted) {
    ASSIGN_OR_RETURN(const int64_t stored, Integer(metadata, key, 0, INT32_MAX));
    if (stored != value) return Refuse("was made for a model with ", key, " = ", stored, "; this one has ", value);
  }
  return absl::OkStatus();
}

absl::Status Reader::ReadPoint(const Json& json, const std::string& name, int32_t outputs, int32_t rank,
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

absl::Status Reader::ReadSelector(const Json& json, const std::string& at, int32_t outputs,
                                  const std::vector<Tier>& tiers, SelectorData* selector) const {
  const absl::Status status = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const int64_t rank, Integer(json, "rank", 0, std::max(config_.hidden, outputs)));
    selector->rank = static_cast<int32_t>(rank);
    if (rank == 0) return absl::OkStatus();
    RETURN_IF_ERROR(ReadTensor(at + ".a", {rank, config_.hidden}, &selector->a));
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

absl::Status Reader::ReadLayer(const Json& json, int32_t l, const std::vector<Tier>& tiers,
                               LayerPredictorData* layer) const {
  const Json& tap = Member(json, "tap");
  const std::optional<Tap> parsed = tap.is_string() ? ParseTap(tap.get<std::string>()) : std::nullopt;
  if (!parsed.has_value() || (l == 0 && *parsed == Tap::kPreviousLayer)) {
    return Refuse("layer ", l, " has tap ", tap.dump());
  }
  layer->tap = *parsed;
  RETURN_IF_ERROR(ReadSelector(Member(json, "neurons"), At(l, "neurons"), config_.ffn, tiers, &layer->neurons));
  RETURN_IF_ERROR(ReadSelector(Member(json, "heads"), At(l, "heads"), config_.heads, tiers, &layer->heads));
  if (layer->tap == Tap::kMlpNorm && layer->heads.rank > 0) {
    return Refuse("layer ", l, " chooses heads from tap ", tap.dump(), ", which comes after its attention");
  }
  RETURN_IF_ERROR(ReadTensor(At(l, "worth"), {config_.ffn}, &layer->worth));
  RETURN_IF_ERROR(CheckFinite(At(l, "worth"), layer->worth));
  for (const float worth : layer->worth) {
    if (worth < 0.0f) return Refuse("tensor ", At(l, "worth"), " holds negative values");
  }
  RETURN_IF_ERROR(ReadTensor(At(l, "frequency"), {config_.ffn}, &layer->frequency, /*of_outline=*/true));
  return CheckFinite(At(l, "frequency"), layer->frequency);
}

absl::Status Reader::ReadMetadata(const Json& metadata, PredictorData* data) const {
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
  if (!layers.is_array() || layers.size() != static_cast<size_t>(config_.layers)) {
    return Refuse("\"per_layer\" does not describe ", config_.layers, " layers");
  }
  data->layers.resize(config_.layers);
  for (int32_t l = 0; l < config_.layers; ++l) {
    RETURN_IF_ERROR(ReadLayer(layers[l], l, data->tiers, &data->layers[l]));
  }
  const Json& report = Member(metadata, "report");
  data->report_json = report.is_object() ? report.dump() : "{}";
  const Json& hash = Member(metadata, "weights");
  data->weights_hash = hash.is_string() ? hash.get<std::string>() : "";
  return absl::OkStatus();
}

absl::StatusOr<PredictorData> Reader::Read() {
  std::string text;
  ASSIGN_OR_RETURN(tensors_, ReadSafetensorsHeader(path_, kPredictorMetadataKey, &text));
  if (text.empty()) return Refuse("is no predictor: its metadata has no \"", kPredictorMetadataKey, "\"");
  ASSIGN_OR_RETURN(const Json metadata, ParseJsonObject(text, path_));
  if (Member(metadata, "version") != kVersion) {
    return Refuse("has version ", Member(metadata, "version").dump(), "; this build reads version ", kVersion);
  }
  PredictorData data;
  RETURN_IF_ERROR(ReadMetadata(metadata, &data));
  return data;
}

}  // namespace

absl::string_view Name(Tap tap) {
  switch (tap) {
    case Tap::kAttentionNorm:
      return "attention-norm";
    case Tap::kMlpNorm:
      return "mlp-norm";
    case Tap::kPreviousLayer:
      return "previous-layer";
  }
  return "unknown";
}

std::optional<Tap> ParseTap(absl::string_view name) {
  for (const Tap tap : {Tap::kAttentionNorm, Tap::kMlpNorm, Tap::kPreviousLayer}) {
    if (Name(tap) == name) return tap;
  }
  return std::nullopt;
}

absl::Status WritePredictor(const PredictorData& data, const OptConfig& config, const std::string& path) {
  SafetensorsWriter writer;
  Json layers = Json::array();
  for (int32_t l = 0; l < config.layers; ++l) {
    const LayerPredictorData& layer = data.layers[l];
    layers.push_back({{"tap", Name(layer.tap)},
                      {"neurons", AddSelector(layer.neurons, config.hidden, config.ffn, At(l, "neurons"), &writer)},
                      {"heads", AddSelector(layer.heads, config.hidden, config.heads, At(l, "heads"), &writer)}});
    writer.Add(At(l, "worth"), {config.ffn}, layer.worth);
    writer.Add(At(l, "frequency"), {config.ffn}, layer.frequency);
  }
  Json tiers = Json::array();
  for (const Tier tier : data.tiers) tiers.push_back(Name(tier));
  Json report = Json::parse(data.report_json, nullptr, /*allow_exceptions=*/false);
  if (!report.is_object()) report = Json::object();
  const Json metadata = {{"version", kVersion},        {"weights", data.weights_hash}, {"tap", Name(data.tap)},
                         {"layers", config.layers},    {"hidden", config.hidden},      {"heads", config.heads},
                         {"ffn", config.ffn},          {"tiers", std::move(tiers)},    {"per_layer", std::move(layers)},
                         {"report", std::move(report)}};
  return writer.Write(kPredictorMetadataKey, metadata.dump(), path);
}

absl::StatusOr<PredictorData> ReadPredictor(const std::string& path, const OptConfig& config,
                                            const std::string& weights_hash) {
  ASSIGN_OR_RETURN(PredictorData data, Reader(path, config, /*outline=*/false).Read());
  if (data.weights_hash != weights_hash) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": was calibrated for other weights (",
                                                      Quoted(data.weights_hash), "); this model has ", weights_hash));
  }
  return data;
}

absl::StatusOr<PredictorData> ReadPredictorOutline(const std::string& path, const OptConfig& config) {
  return Reader(path, config, /*outline=*/true).Read();
}

}  // namespace dejavu
