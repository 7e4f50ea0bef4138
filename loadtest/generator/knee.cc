#include "loadtest/generator/knee.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace dejavu {

std::vector<std::string> FallsShort(const Json& run) {
  std::vector<std::string> reasons;
  if (!run.value("valid", false)) reasons.push_back("the run is invalid");
  if (const double failed = Number(run, "failed").value_or(0); failed > 0) {
    reasons.push_back(absl::StrCat(Short(failed), failed == 1 ? " request failed" : " requests failed"));
  }
  const Json objectives = run.value("objectives", Json::object());
  const bool wanted = std::any_of(objectives.begin(), objectives.end(), [](const Json& o) { return o.is_number(); });
  const std::optional<double> share = Number(run, "goodput_share");
  if (!wanted) {
    reasons.push_back("no objectives were given");
  } else if (share.value_or(0) < kWantedShare) {
    reasons.push_back(
        absl::StrCat(Percent(share), " of the requests met the objectives; ", Percent(kWantedShare), " are wanted"));
  }
  const std::optional<double> wanted_ms = Number(objectives, "itl_p99_ms");
  const std::optional<double> itl_ms = Number(run, "p99_itl_ms");
  if (wanted_ms.has_value() && itl_ms.has_value() && *itl_ms > *wanted_ms) {
    reasons.push_back(absl::StrCat("p99 between tokens ", Short(itl_ms), " ms; ", Short(wanted_ms), " ms are wanted"));
  }
  return reasons;
}

std::vector<Series> FindSeries(const std::vector<Json>& runs) {
  std::vector<Series> all;
  for (size_t i = 0; i < runs.size(); ++i) {
    const std::string label = Text(runs[i], "label"), loop = Text(runs[i], "loop"), model = Text(runs[i], "model_id");
    const auto same = [&](const Series& s) {
      return s.label == label && s.loop == loop && Text(runs[s.runs.front()], "model_id") == model;
    };
    auto series = std::find_if(all.begin(), all.end(), same);
    if (series == all.end()) series = all.insert(all.end(), Series{label, loop, {}, {}, {}});
    series->runs.push_back(i);
  }
  for (Series& series : all) {
    const bool open = series.loop == "open";
    const std::string by = open ? "offered_rate" : "max_concurrency";
    std::stable_sort(series.runs.begin(), series.runs.end(),
                     [&](size_t a, size_t b) { return Number(runs[a], by) < Number(runs[b], by); });
    if (!open) continue;
    for (const size_t i : series.runs) {
      series.ended_by = FallsShort(runs[i]);
      if (!series.ended_by.empty()) break;
      series.knee = i;
    }
  }
  return all;
}

}  // namespace dejavu
