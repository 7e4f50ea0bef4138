#include "engine/load/synthetic/synthetic_model.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/load/synthetic/densities.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr char kPrefix[] = "synthetic:";

struct NamedShape {
  const char* name;
  int32_t hidden, layers, heads, ffn, vocab, context;
  int profile;
};

// Zhang et al., "OPT" (arXiv 2205.01068), table 1. The small ones have no published profile and take 6.7b's, 175b
// takes 66b's.
constexpr NamedShape kShapes[] = {
    {"opt-tiny", 256, 4, 4, 1024, 512, 512, 0},         {"opt-125m", 768, 12, 12, 3072, 50272, 2048, 0},
    {"opt-1.3b", 2048, 24, 32, 8192, 50272, 2048, 0},   {"opt-2.7b", 2560, 32, 32, 10240, 50272, 2048, 0},
    {"opt-6.7b", 4096, 32, 32, 16384, 50272, 2048, 0},  {"opt-13b", 5120, 40, 40, 20480, 50272, 2048, 1},
    {"opt-30b", 7168, 48, 56, 28672, 50272, 2048, 2},   {"opt-66b", 9216, 64, 72, 36864, 50272, 2048, 3},
    {"opt-175b", 12288, 96, 96, 49152, 50272, 2048, 3},
};

OptConfig ConfigOf(const NamedShape& shape) {
  OptConfig config;
  config.hidden = config.embed = shape.hidden;
  config.layers = shape.layers;
  config.heads = shape.heads;
  config.head_dim = shape.hidden / shape.heads;
  config.ffn = shape.ffn;
  config.vocab = shape.vocab;
  config.context = shape.context;
  return config;
}

// "recall=0.9" into `model`; false: there is no such option, or its value is not allowed.
bool TakeOption(absl::string_view option, SyntheticModel* model) {
  const std::pair<absl::string_view, absl::string_view> entry = absl::StrSplit(option, absl::MaxSplits('=', 1));
  const auto between = [&](double* value, double least, double most) {
    double parsed = 0.0;
    if (!absl::SimpleAtod(entry.second, &parsed) || !(parsed >= least && parsed <= most)) return false;
    *value = parsed;
    return true;
  };
  if (entry.first == "seed") return absl::SimpleAtoi(entry.second, &model->seed);
  if (entry.first == "recall") return between(&model->recall, 0.5, 0.99);
  if (entry.first == "density") return between(&model->density, 0.1, 5.0);
  return false;
}

}  // namespace

bool IsSynthetic(const std::string& model) { return absl::StartsWith(model, kPrefix); }

absl::StatusOr<SyntheticModel> ParseSynthetic(const std::string& model) {
  const std::string text = model.substr(IsSynthetic(model) ? sizeof kPrefix - 1 : 0);
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits('?', 1));
  const auto* const shape =
      std::find_if(std::begin(kShapes), std::end(kShapes), [&](const NamedShape& s) { return s.name == parts.first; });
  if (shape == std::end(kShapes)) {
    const auto append = [](std::string* out, const NamedShape& s) { absl::StrAppend(out, kPrefix, s.name); };
    return absl::InvalidArgumentError(absl::StrCat("there is no synthetic model '", parts.first, "'; there are ",
                                                   absl::StrJoin(kShapes, ", ", append)));
  }
  SyntheticModel result;
  result.name = shape->name;
  result.profile = shape->profile;
  result.config = ConfigOf(*shape);
  for (const absl::string_view option : absl::StrSplit(parts.second, '&', absl::SkipEmpty())) {
    if (TakeOption(option, &result)) continue;
    return absl::InvalidArgumentError(absl::StrCat(model, ": option '", option,
                                                   "' must be seed=NUMBER, recall=0.5 ... 0.99 (of BALANCED) or "
                                                   "density=0.1 ... 5 (multiple of the published densities)"));
  }
  return result;
}

std::string SyntheticModel::Description() const {
  const NeuronTable table(recall);
  double selected = 0.0, active = 0.0, hits = 0.0;
  for (int q = 0; q < kDensityQuarters; ++q) {  // one layer stands for its quarter, the last: layer 0 is denser
    const SyntheticDensity layer = ExpectedDensity(*this, table, (q + 1) * config.layers / kDensityQuarters - 1, 1);
    selected += layer.selected / kDensityQuarters;
    active += layer.active / kDensityQuarters;
    hits += layer.selected * layer.precision / kDensityQuarters;
  }
  return absl::StrFormat(
      "random weights in the shape of %s, seed %d, MLP densities after Polar Sparsity's %s times %g: about %.1f %% "
      "active, %.1f %% selected by BALANCED at recall %.2f and precision %.2f",
      name, seed, DensitySource(*this), density, 100.0 * active, 100.0 * selected, recall, hits / selected);
}

std::string SyntheticModel::Fingerprint() const {
  return absl::StrFormat("synthetic:%s?seed=%d&recall=%g&density=%g", name, seed, recall, density);
}

}  // namespace dejavu
