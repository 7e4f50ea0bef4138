#include "engine/calibration/calibration_state.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/calibration/sample_collector.h"
#include "engine/formats/checkpoint.h"
#include "engine/formats/json_text.h"
#include "engine/formats/safetensors_writer.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

constexpr char kStateKey[] = "dejavu.calibration";

// Adds a selector under the name `at`; its ranks.
nlohmann::json AddSelector(const FloatSelector& selector, const std::string& at, SafetensorsWriter* writer) {
  nlohmann::json ranks = nlohmann::json::array();
  writer->Add(absl::StrCat(at, ".a"), {selector.a.rows, selector.a.cols}, selector.a.values);
  writer->Add(absl::StrCat(at, ".b"), {selector.b.rows, selector.b.cols}, selector.b.values);
  for (const FloatSelector::Point& point : selector.points) {
    writer->Add(absl::StrCat(at, ".bias.", ranks.size()), {static_cast<int64_t>(point.bias.size())}, point.bias);
    ranks.push_back(point.rank);
  }
  return ranks;
}

class StateReader {
 public:
  explicit StateReader(TensorMap tensors) : tensors_(std::move(tensors)) {}

  absl::Status Read(const std::string& name, std::vector<float>* values) const {
    ASSIGN_OR_RETURN(const StoredTensor* const tensor, Find(name));
    values->resize(tensor->elements);
    return Checkpoint::Read(*tensor, 0, tensor->elements, values->data());
  }
  absl::Status Read(const std::string& name, HostMatrix* matrix) const {
    ASSIGN_OR_RETURN(const StoredTensor* const tensor, Find(name));
    if (tensor->shape.size() == 2) *matrix = HostMatrix(tensor->shape[0], tensor->shape[1]);
    return Read(name, &matrix->values);
  }
  absl::Status ReadSelector(const std::string& at, const nlohmann::json& ranks, FloatSelector* selector) const {
    RETURN_IF_ERROR(Read(absl::StrCat(at, ".a"), &selector->a));
    RETURN_IF_ERROR(Read(absl::StrCat(at, ".b"), &selector->b));
    for (const nlohmann::json& rank : ranks) {
      FloatSelector::Point& point = selector->points.emplace_back();
      point.rank = rank.get<int32_t>();
      RETURN_IF_ERROR(Read(absl::StrCat(at, ".bias.", selector->points.size() - 1), &point.bias));
    }
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<const StoredTensor*> Find(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end() || found->second.dtype != DType::kFloat32) return absl::DataLossError(name);
    return &found->second;
  }

  const TensorMap tensors_;
};

}  // namespace

absl::Status SaveState(const CalibrationState& state, const ModelShape& shape, const std::string& settings,
                       const std::string& path) {
  SafetensorsWriter writer;
  writer.Add("fisher", {state.fisher.rows, state.fisher.cols}, state.fisher.values);
  nlohmann::json layers = nlohmann::json::object();
  for (int32_t l = 0; l < shape.layers; ++l) {
    const LayerSensitivity& sensitivity = state.sensitivities[l];
    writer.Add(absl::StrCat(l, ".sensitivity"), {shape.ffn}, sensitivity.per_neuron);
    writer.Add(absl::StrCat(l, ".common"), {2}, std::vector<float>{sensitivity.common, sensitivity.heads});
    if (state.facts[l].worth.empty()) continue;
    writer.Add(absl::StrCat(l, ".worth"), {shape.ffn}, state.facts[l].worth);
    writer.Add(absl::StrCat(l, ".frequency"), {shape.ffn}, state.facts[l].frequency);
    nlohmann::json& layer = layers[absl::StrCat(l)];
    layer["neurons"] = AddSelector(state.fits[l].neurons, absl::StrCat(l, ".neurons"), &writer);
    layer["heads"] = AddSelector(state.fits[l].heads, absl::StrCat(l, ".heads"), &writer);
  }
  return writer.Write(kStateKey, nlohmann::json{{"settings", settings}, {"layers", layers}}.dump(), path);
}

absl::StatusOr<CalibrationState> LoadState(const ModelShape& shape, Tap tap, const std::string& settings,
                                           const std::string& path) {
  ASSIGN_OR_RETURN(FileTensors file, ReadSafetensorsHeader(path));
  ASSIGN_OR_RETURN(const nlohmann::json json, ParseJsonObject(file.metadata[kStateKey], path));
  if (json.value("settings", "") != settings) return absl::NotFoundError("the state belongs to other settings");
  const StateReader reader(std::move(file.tensors));
  CalibrationState state;
  state.sensitivities.resize(shape.layers);
  state.fits.resize(shape.layers);
  state.facts.resize(shape.layers);
  RETURN_IF_ERROR(reader.Read("fisher", &state.fisher));
  for (int32_t l = 0; l < shape.layers; ++l) {
    std::vector<float> common;
    RETURN_IF_ERROR(reader.Read(absl::StrCat(l, ".sensitivity"), &state.sensitivities[l].per_neuron));
    RETURN_IF_ERROR(reader.Read(absl::StrCat(l, ".common"), &common));
    if (common.size() != 2) return absl::DataLossError("common");
    state.sensitivities[l].common = common[0];
    state.sensitivities[l].heads = common[1];
    const auto layer = json["layers"].find(absl::StrCat(l));
    if (layer == json["layers"].end()) continue;
    LayerPredictorData& facts = state.facts[l];
    RETURN_IF_ERROR(reader.Read(absl::StrCat(l, ".worth"), &facts.worth));
    RETURN_IF_ERROR(reader.Read(absl::StrCat(l, ".frequency"), &facts.frequency));
    facts.tap = TapOfLayer(tap, l);
    RETURN_IF_ERROR(reader.ReadSelector(absl::StrCat(l, ".neurons"), (*layer)["neurons"], &state.fits[l].neurons));
    RETURN_IF_ERROR(reader.ReadSelector(absl::StrCat(l, ".heads"), (*layer)["heads"], &state.fits[l].heads));
  }
  return state;
}

}  // namespace dejavu
