#include "engine/model/predictor_file.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/formats/json_text.h"
#include "engine/formats/safetensors_writer.h"
#include "engine/model/predictor_reader.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

using Json = nlohmann::json;

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

}  // namespace

std::string PredictorTensorName(int32_t layer, absl::string_view name) {
  return absl::StrCat("layers.", layer, ".", name);
}

absl::Status WritePredictor(const PredictorData& data, const ModelShape& shape, const std::string& path) {
  SafetensorsWriter writer;
  Json layers = Json::array();
  for (int32_t l = 0; l < shape.layers; ++l) {
    const LayerPredictorData& layer = data.layers[l];
    layers.push_back(
        {{"tap", Name(layer.tap)},
         {"neurons", AddSelector(layer.neurons, shape.hidden, shape.ffn, PredictorTensorName(l, "neurons"), &writer)},
         {"heads", AddSelector(layer.heads, shape.hidden, shape.heads, PredictorTensorName(l, "heads"), &writer)}});
    writer.Add(PredictorTensorName(l, "worth"), {shape.ffn}, layer.worth);
    writer.Add(PredictorTensorName(l, "frequency"), {shape.ffn}, layer.frequency);
  }
  Json tiers = Json::array();
  for (const Tier tier : data.tiers) tiers.push_back(Name(tier));
  Json report = Json::parse(data.report_json, nullptr, /*allow_exceptions=*/false);
  if (!report.is_object()) report = Json::object();
  const Json metadata = {{"version", kPredictorVersion},
                         {"weights", data.weights_hash},
                         {"tap", Name(data.tap)},
                         {"layers", shape.layers},
                         {"hidden", shape.hidden},
                         {"heads", shape.heads},
                         {"ffn", shape.ffn},
                         {"tiers", std::move(tiers)},
                         {"per_layer", std::move(layers)},
                         {"report", std::move(report)}};
  return writer.Write(kPredictorMetadataKey, metadata.dump(), path);
}

absl::StatusOr<PredictorData> ReadPredictor(const std::string& path, const ModelShape& shape,
                                            const std::string& weights_hash) {
  ASSIGN_OR_RETURN(PredictorData data, PredictorReader(path, shape, /*outline=*/false).Read());
  if (data.weights_hash != weights_hash) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": was calibrated for other weights (",
                                                      Quoted(data.weights_hash), "); this model has ", weights_hash));
  }
  return data;
}

absl::StatusOr<PredictorData> ReadPredictorOutline(const std::string& path, const ModelShape& shape) {
  return PredictorReader(path, shape, /*outline=*/true).Read();
}

}  // namespace dejavu
