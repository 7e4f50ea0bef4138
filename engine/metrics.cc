#include "engine/metrics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/check.h"

namespace dejavu {
namespace {

const std::vector<double> kFirstToken = {.001, .0025, .005, .01, .02, .04, .06, .08, .1, .15, .2,
                                         .25,  .5,    .75,  1,   2.5, 5,   7.5, 10,  20, 40,  80};
const std::vector<double> kInterToken = {.0005, .001, .002, .003, .004, .005, .0075, .01, .015, .02, .025,
                                         .03,   .04,  .05,  .075, .1,   .15,  .25,   .5,  1,    2.5};
const std::vector<double> kRequest = {.001, .0025, .005, .01, .02, .04, .06, .08, .1, .15, .2,  .25,
                                      .5,   .75,   1,    2.5, 5,   7.5, 10,  20,  40, 80,  160, 640};
const std::vector<double> kShort = {.00001, .000025, .00005, .0001, .00025, .0005, .001, .0025, .005,
                                    .01,    .025,    .05,    .1,    .25,    .5,    1,    2.5,   5};
const std::vector<double> kDensity = {.02, .05, .1, .15, .2, .25, .3, .4, .5, .6, .7, .8, .9, 1};
const std::vector<double> kQuality = {.5, .7, .8, .9, .95, .97, .98, .99, .995, .999, 1};

MetricEdges Defaults() {
  std::vector<double> rows(16);
  std::iota(rows.begin(), rows.end(), 1.0);
  return {
      {"time_to_first_token_seconds", kFirstToken},
      {"inter_token_latency_seconds", kInterToken},
      {"time_per_output_token_seconds", kInterToken},
      {"request_duration_seconds", kRequest},
      {"queue_time_seconds", kRequest},
      {"prefill_time_seconds", kRequest},
      {"decode_time_seconds", kRequest},
      {"client_stall_seconds", kShort},
      {"step_duration_seconds", kInterToken},
      {"step_component_seconds", kShort},
      {"batch_size", rows},
      {"step_tokens", {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096}},
      {"mlp_density_ratio", kDensity},
      {"attention_head_density_ratio", kDensity},
      {"union_inflation_ratio", {1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 16}},
      {"predictor_recall_ratio", kQuality},
      {"predictor_precision_ratio", kQuality},
      {"predictor_missed_mass_ratio", {.0001, .0003, .001, .003, .01, .02, .03, .05, .1, .2, .5, 1}},
      {"shadow_kl_nats", {.0001, .0003, .001, .003, .01, .03, .1, .3, 1, 3}},
      {"rank_imbalance_ratio", {1, 1.01, 1.02, 1.03, 1.05, 1.075, 1.1, 1.15, 1.2, 1.3, 1.5, 2}},
  };
}

std::vector<Histogram> Several(size_t count, const std::vector<double>* edges) {
  std::vector<Histogram> histograms;
  histograms.reserve(count);
  for (size_t i = 0; i < count; ++i) histograms.emplace_back(edges);
  return histograms;
}

}  // namespace

void Histogram::Observe(double value, int64_t times) {
  const auto bucket = std::lower_bound(edges_->begin(), edges_->end(), value) - edges_->begin();
  counts_[bucket].Add(times);
  sum_.Add(value * static_cast<double>(times));
}

Histogram::Snapshot Histogram::snapshot() const {
  Snapshot snapshot;
  for (const Counter<int64_t>& count : counts_) snapshot.counts.push_back(count.value());
  snapshot.sum = sum_.value();
  return snapshot;
}

int64_t Histogram::Snapshot::count() const { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

double Histogram::Snapshot::Quantile(double q, const std::vector<double>& edges) const {
  const double rank = q * static_cast<double>(count());
  double below = 0.0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const auto here = static_cast<double>(counts[i]);
    if (here > 0.0 && below + here >= rank) {
      if (i == edges.size()) return edges.back();
      const double low = i == 0 ? 0.0 : edges[i - 1];
      return low + (edges[i] - low) * (rank - below) / here;
    }
    below += here;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

absl::StatusOr<MetricEdges> MetricEdgesFrom(const std::string& text) {
  MetricEdges edges = Defaults();
  for (const absl::string_view entry : absl::StrSplit(text, ';', absl::SkipWhitespace())) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(entry, absl::MaxSplits('=', 1));
    const std::string name(absl::StripAsciiWhitespace(parts.first));
    if (!edges.contains(name)) {
      return absl::InvalidArgumentError(absl::StrCat("metrics.edges names '", name,
                                                     "', which is no histogram; it must be "
                                                     "FAMILY=EDGE,EDGE;... with families such as "
                                                     "inter_token_latency_seconds"));
    }
    std::vector<double> own;
    for (const absl::string_view edge : absl::StrSplit(parts.second, ',')) {
      double value = 0.0;
      if (!absl::SimpleAtod(edge, &value) || !std::isfinite(value) || (!own.empty() && value <= own.back())) {
        return absl::InvalidArgumentError(
            absl::StrCat("metrics.edges of ", name, " has '", edge, "'; edges are numbers that ascend"));
      }
      own.push_back(value);
    }
    edges[name] = std::move(own);
  }
  return edges;
}

EngineMetrics::Latencies::Latencies(const MetricEdges& edges)
    : time_to_first_token(&edges.at("time_to_first_token_seconds")),
      inter_token(&edges.at("inter_token_latency_seconds")),
      time_per_output_token(&edges.at("time_per_output_token_seconds")),
      duration(&edges.at("request_duration_seconds")),
      queue(&edges.at("queue_time_seconds")),
      prefill(&edges.at("prefill_time_seconds")),
      decode(&edges.at("decode_time_seconds")) {}

EngineMetrics::EngineMetrics(MetricEdges all_edges)
    : edges(std::move(all_edges)),
      step_duration(Several(kStepPhases, &edges.at("step_duration_seconds"))),
      step_component(Several(kStepComponents, &edges.at("step_component_seconds"))),
      batch_size(&edges.at("batch_size")),
      step_tokens(&edges.at("step_tokens")),
      request_mlp_density(&edges.at("mlp_density_ratio")),
      request_head_density(&edges.at("attention_head_density_ratio")),
      union_mlp_density(Several(kLayerGroups, &edges.at("mlp_density_ratio"))),
      union_head_density(Several(kLayerGroups, &edges.at("attention_head_density_ratio"))),
      union_inflation(Several(kBatchSizes.size(), &edges.at("union_inflation_ratio"))),
      recall(Several(kLayerGroups, &edges.at("predictor_recall_ratio"))),
      precision(Several(kLayerGroups, &edges.at("predictor_precision_ratio"))),
      missed_mass(Several(kLayerGroups, &edges.at("predictor_missed_mass_ratio"))),
      shadow_kl(Several(kTiers, &edges.at("shadow_kl_nats"))),
      imbalance(&edges.at("rank_imbalance_ratio")) {
  latencies.reserve(static_cast<size_t>(kTiers) * kUrgencies);
  for (int i = 0; i < kTiers * kUrgencies; ++i) latencies.emplace_back(edges);
}

}  // namespace dejavu
