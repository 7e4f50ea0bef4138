#include "loadtest/generator/page.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "loadtest/generator/knee.h"

namespace dejavu {

extern const char kReportHtml[];

namespace {

constexpr size_t kPointsOfPage = 20'000;  // in all scatter plots together: 2 MB
constexpr size_t kPointsOfRun = 200;      // at least

Json Thinned(const Json& points, size_t most) {
  if (points.size() <= most) return points;
  Json kept = Json::array();
  for (size_t i = 0; i < most; ++i) kept.push_back(points[i * points.size() / most]);
  return kept;
}

// What is only drawn needs no more than five digits.
void Shorten(Json& value) {
  if (value.is_number_float()) {
    value = std::strtod(absl::StrFormat("%.5g", value.get<double>()).c_str(), nullptr);
  } else if (value.is_structured()) {
    for (Json& member : value) Shorten(member);
  }
}

}  // namespace

std::string HtmlPage(const std::vector<Json>& runs) {
  Json data = {{"runs", Json::array()}, {"series", Json::array()}, {"wanted_share", kWantedShare}};
  for (Json run : runs) {
    if (run.contains("requests_sample")) {
      run["requests_sample"] = Thinned(run["requests_sample"], std::max(kPointsOfRun, kPointsOfPage / runs.size()));
    }
    for (const char* drawn : {"requests_sample", "timeline", "histograms"}) {
      if (run.contains(drawn)) Shorten(run[drawn]);
    }
    data["runs"].push_back(std::move(run));
  }
  for (const Series& series : FindSeries(runs)) {
    data["series"].push_back({{"label", series.label},
                              {"loop", series.loop},
                              {"runs", series.runs},
                              {"knee", series.knee.has_value() ? Json(*series.knee) : Json()},
                              {"ended_by", series.ended_by}});
  }
  // `<` ends the script element in an HTML parser's eyes when `/script` follows.
  const std::string text =
      absl::StrReplaceAll(data.dump(-1, ' ', false, Json::error_handler_t::replace), {{"<", "\\u003c"}});
  std::string page = kReportHtml;
  const std::string place = "%RESULTS%";
  return page.replace(page.find(place), place.size(), text);
}

}  // namespace dejavu
