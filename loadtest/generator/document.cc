#include "loadtest/generator/document.h"

#include <cmath>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace dejavu {

absl::StatusOr<std::vector<Json>> ReadResults(const std::vector<std::string>& paths) {
  std::vector<Json> results;
  for (const std::string& path : paths) {
    std::ifstream file(path);
    if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
    Json content = Json::parse(file, nullptr, /*allow_exceptions=*/false);
    if (content.is_object()) content = Json::array({std::move(content)});
    if (!content.is_array()) return absl::InvalidArgumentError(absl::StrCat(path, ": is no JSON of a result"));
    for (Json& result : content) {
      if (!result.is_object() || !result.contains("loop") || !result.contains("valid")) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": is no result of dejavu-loadtest: no `loop` and `valid`"));
      }
      results.push_back(std::move(result));
    }
  }
  if (results.empty()) return absl::InvalidArgumentError("no result to report");
  return results;
}

std::optional<double> Number(const Json& object, const std::string& key) {
  if (!object.is_object()) return std::nullopt;
  const auto found = object.find(key);
  if (found == object.end() || !found->is_number()) return std::nullopt;
  return found->get<double>();
}

std::string Text(const Json& object, const std::string& key) {
  if (!object.is_object()) return "";
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

std::string Backend(const Json& run) {
  const Json info = run.value("server", Json::object()).value("info", Json::object());
  const std::string synthetic = Text(info, "synthetic");
  return absl::StrCat(Text(info, "backend"), synthetic.empty() ? "" : ", SYNTHETIC weights: ", synthetic);
}

std::string Short(double x) { return std::abs(x) >= 99.95 ? absl::StrFormat("%.0f", x) : absl::StrFormat("%.3g", x); }

std::string Short(std::optional<double> x) { return x.has_value() ? Short(*x) : "-"; }

std::string Percent(std::optional<double> share) {
  if (!share.has_value()) return "-";
  return absl::StrFormat(*share > 0.985 && *share < 1 ? "%.4g %%" : "%.3g %%", 100 * *share);
}

std::optional<double> MeanDensity(const Json& run) {
  double sum = 0;
  int count = 0;
  for (const Json& request : run.value("requests_sample", Json::array())) {
    const std::optional<double> density = Number(request, "density");
    if (!density.has_value()) continue;
    sum += *density;
    ++count;
  }
  if (count == 0) return std::nullopt;
  return sum / count;
}

}  // namespace dejavu
