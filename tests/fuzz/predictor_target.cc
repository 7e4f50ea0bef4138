// A predictor file: its description and its tensors' headers are the input's, their lengths right, the data any bytes.
// What is accepted is written, read again and must be the same.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/model/opt_config.h"
#include "engine/model/predictor_file.h"
#include "nlohmann/json.hpp"
#include "tests/engine/formats/checkpoint_files.h"
#include "tests/engine/random_predictor.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

constexpr size_t kDataBytes = 1024;

OptConfig TinyConfig() {
  OptConfig config;
  config.hidden = 4;
  config.layers = 2;
  config.heads = 2;
  config.head_dim = 2;
  config.ffn = 6;
  config.vocab = 8;
  config.context = 8;
  return config;
}

void CheckSelector(const SelectorData& selector, int32_t hidden, size_t outputs) {
  const auto rank = static_cast<size_t>(selector.rank);
  CHECK(selector.a.size() == rank * hidden && selector.b.size() == rank * outputs && selector.a_scale.size() == rank)
      << "rank " << rank;
  for (const std::optional<OperatingPoint>& point : selector.points) {
    if (!point.has_value()) continue;
    CHECK(point->rank >= 1 && point->rank <= selector.rank && point->thresholds.size() == outputs) << point->rank;
    for (const double share : {point->missed_mass, point->missed_share, point->density}) {
      CHECK(share >= 0.0 && share <= 1.0) << share;
    }
  }
}

void CheckPredictor(const PredictorData& data, const OptConfig& config) {
  CHECK(data.layers.size() == static_cast<size_t>(config.layers)) << data.layers.size();
  for (const LayerPredictorData& layer : data.layers) {
    CheckSelector(layer.neurons, config.hidden, config.ffn);
    CheckSelector(layer.heads, config.hidden, config.heads);
    CHECK(layer.worth.size() == static_cast<size_t>(config.ffn)) << layer.worth.size();
    CHECK(layer.frequency.size() == static_cast<size_t>(config.ffn)) << layer.frequency.size();
  }
}

bool Same(const SelectorData& x, const SelectorData& y) {
  const auto same_point = [](const std::optional<OperatingPoint>& a, const std::optional<OperatingPoint>& b) {
    if (a.has_value() != b.has_value()) return false;
    return !a.has_value() ||
           (a->rank == b->rank && a->thresholds == b->thresholds && a->missed_mass == b->missed_mass &&
            a->missed_share == b->missed_share && a->density == b->density);
  };
  return x.rank == y.rank && x.a == y.a && x.a_scale == y.a_scale && x.b == y.b &&
         std::equal(x.points.begin(), x.points.end(), y.points.begin(), same_point);
}

bool Same(const PredictorData& x, const PredictorData& y) {
  const auto same_layer = [](const LayerPredictorData& a, const LayerPredictorData& b) {
    return a.tap == b.tap && Same(a.neurons, b.neurons) && Same(a.heads, b.heads) && a.worth == b.worth &&
           a.frequency == b.frequency;
  };
  return x.weights_hash == y.weights_hash && x.tap == y.tap && x.tiers == y.tiers && x.report_json == y.report_json &&
         std::equal(x.layers.begin(), x.layers.end(), y.layers.begin(), y.layers.end(), same_layer);
}

// The description, the members of the header, and what overlays the zeros of the data.
std::string File(FuzzInput input) {
  const nlohmann::json description(std::string(input.Section()));
  const absl::string_view members = input.Section();
  std::string data(input.Rest());
  data.resize(kDataBytes, '\0');
  return Safetensors(absl::StrCat(R"({"__metadata__":{")", kPredictorMetadataKey, R"(":)",
                                  description.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace), "}",
                                  members.empty() ? "" : ",", members, "}"),
                     data);
}

void Run(absl::string_view bytes) {
  static const FuzzFiles& files = *new FuzzFiles;
  static const OptConfig& config = *new OptConfig(TinyConfig());
  FuzzInput input(bytes);
  const bool raw = (input.Byte() & 1) != 0;
  const std::string path = files.Write("predictor.safetensors", raw ? std::string(input.Rest()) : File(input));
  const absl::StatusOr<PredictorData> outline = ReadPredictorOutline(path, config);
  CheckAnswer(outline.status(), {absl::StatusCode::kInvalidArgument});
  const absl::StatusOr<PredictorData> foreign = ReadPredictor(path, config, "of other weights");
  CheckAnswer(foreign.status(), {absl::StatusCode::kInvalidArgument, absl::StatusCode::kFailedPrecondition});
  if (!outline.ok()) {
    CHECK(!foreign.ok()) << "a predictor without an outline";
    return;
  }
  const absl::StatusOr<PredictorData> data = ReadPredictor(path, config, outline->weights_hash);
  CheckAnswer(data.status(), {absl::StatusCode::kInvalidArgument});
  if (!data.ok()) return;
  CheckPredictor(*data, config);
  const std::string copy = files.path() + "/copy.safetensors";
  CHECK(WritePredictor(*data, config, copy).ok()) << "cannot write " << copy;
  const absl::StatusOr<PredictorData> again = ReadPredictor(copy, config, data->weights_hash);
  CHECK(again.ok()) << again.status();
  CHECK(Same(*data, *again)) << "what was written is something else";
}

// A file that WritePredictor has made, taken apart as File puts it together.
std::string Seed(const PredictorData& data, const OptConfig& config) {
  const ScratchDirectory directory;
  const std::string path = directory.Path("seed.safetensors");
  CHECK(WritePredictor(data, config, path).ok()) << path;
  const std::string file = ReadAll(path);
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | static_cast<uint8_t>(file[i]);
  nlohmann::json header = nlohmann::json::parse(file.substr(8, header_bytes));
  const std::string description = header["__metadata__"][kPredictorMetadataKey];
  header.erase("__metadata__");
  const std::string members = header.dump();
  return absl::StrCat(std::string(1, '\0'), description, "\x1e", members.substr(1, members.size() - 2), "\x1e",
                      file.substr(8 + header_bytes));
}

}  // namespace

FuzzTarget PredictorTarget() {
  const OptConfig config = TinyConfig();
  PredictorData small = RandomPredictor(config, "hash", 1);
  for (LayerPredictorData& layer : small.layers) {
    for (SelectorData* selector : {&layer.neurons, &layer.heads}) {
      *selector = {};
    }
  }
  PredictorData one_tier = RandomPredictor(config, "", 2);
  one_tier.tiers = {Tier::kHigh};
  one_tier.layers[0].heads = one_tier.layers[1].heads = one_tier.layers[1].neurons = {};
  one_tier.layers[0].neurons.points[static_cast<size_t>(Tier::kBalanced)].reset();
  one_tier.layers[0].neurons.points[static_cast<size_t>(Tier::kFast)].reset();
  one_tier.layers[1].tap = Tap::kPreviousLayer;
  return {"predictor",
          8192,
          Run,
          {Seed(RandomPredictor(config, "hash", 3), config), Seed(small, config), Seed(one_tier, config)},
          {"\"rank\":",
           "\"points\":",
           "\"tap\":",
           "\"previous-layer\"",
           "\"mlp-norm\"",
           "\"attention-norm\"",
           "\"tiers\":",
           "\"high\"",
           "\"balanced\"",
           "\"fast\"",
           "\"dense\"",
           "\"per_layer\":",
           "\"report\":{}",
           "\"version\":1",
           "\"missed_mass\":",
           "\"density\":1e-9",
           "0.5",
           "-1",
           "18446744073709551615",
           "null",
           "\x1e",
           Raw("\x00\x7c"),
           Raw("\x00\xfc"),
           Raw("\x01\x7e")}};
}

}  // namespace dejavu
