#include "loadtest/generator/server_metrics.h"

#include <civetweb.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace dejavu {
namespace {

constexpr int kTimeoutMs = 5000;
constexpr size_t kMaxBytes = size_t{64} << 20;

absl::StatusOr<std::string> Get(const std::string& url) {
  absl::string_view rest = url;
  const size_t slash = absl::ConsumePrefix(&rest, "http://") ? rest.find('/') : 0;
  const std::string address(rest.substr(0, slash));
  const std::string path = slash == absl::string_view::npos ? "/metrics" : std::string(rest.substr(slash));
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 1 || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", url, "' is no address of metrics; it must be http://HOST:PORT"));
  }
  char error[256] = "";
  const std::unique_ptr<mg_connection, decltype(&mg_close_connection)> connection(
      mg_connect_client(address.substr(0, colon).c_str(), port, 0, error, sizeof(error)), mg_close_connection);
  if (connection == nullptr) return absl::UnavailableError(absl::StrCat(url, ": ", error));
  mg_printf(connection.get(), "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path.c_str(),
            address.c_str());
  if (mg_get_response(connection.get(), error, sizeof(error), kTimeoutMs) < 0) {
    return absl::UnavailableError(absl::StrCat(url, ": ", error));
  }
  if (const int code = mg_get_response_info(connection.get())->status_code; code != 200) {
    return absl::UnavailableError(absl::StrCat(url, ": answered with HTTP status ", code));
  }
  std::string body;
  char part[16384];
  for (int size; (size = mg_read(connection.get(), part, sizeof(part))) > 0;) {
    body.append(part, size);
    if (body.size() > kMaxBytes)
      return absl::ResourceExhaustedError(absl::StrCat(url, ": answers with more than 64 MiB"));
  }
  return body;
}

// The value of a label in `name{a="b",c="d"}`. Quotes within values are escaped, so that none is mistaken for a label.
std::string Label(absl::string_view series, absl::string_view label) {
  for (const char* before : {"{", ","}) {
    const std::string opening = absl::StrCat(before, label, "=\"");
    const size_t at = series.find(opening);
    if (at == absl::string_view::npos) continue;
    const size_t begin = at + opening.size();
    return std::string(series.substr(begin, series.find('"', begin) - begin));
  }
  return "";
}

bool IsOf(absl::string_view series, absl::string_view name) {
  return absl::ConsumePrefix(&series, name) && (series.empty() || series.front() == '{');
}

double Total(const MetricsSnapshot& samples, absl::string_view name) {
  double total = 0;
  for (auto at = samples.lower_bound(std::string(name)); at != samples.end() && absl::StartsWith(at->first, name);
       ++at) {
    if (IsOf(at->first, name)) total += at->second;
  }
  return total;
}

std::map<std::string, double> TotalBy(const MetricsSnapshot& samples, absl::string_view name, absl::string_view label) {
  std::map<std::string, double> totals;
  for (const auto& [series, value] : samples) {
    if (IsOf(series, name) && value != 0) totals[Label(series, label)] += value;
  }
  return totals;
}

// All series of a histogram together: upper edges in ms and how many values lie in each bucket.
struct Buckets {
  std::vector<double> edges_ms;  // ascending, the last one infinite
  std::vector<double> counts;

  // The bucket in which that share of the values is reached; nothing of no values.
  std::optional<size_t> Reach(double share) const {
    double total = 0, below = 0;
    for (const double count : counts) total += count;
    for (size_t i = 0; i < counts.size(); ++i) {
      below += counts[i];
      if (counts[i] > 0 && below >= share * total) return i;
    }
    return std::nullopt;
  }
  size_t Holds(double ms) const {
    return std::lower_bound(edges_ms.begin(), edges_ms.end() - 1, ms) - edges_ms.begin();
  }
};

Buckets FindBuckets(const MetricsSnapshot& samples, const std::string& name) {
  std::map<double, double> cumulative;
  for (const auto& [series, value] : samples) {
    double edge;
    if (IsOf(series, absl::StrCat(name, "_bucket")) && absl::SimpleAtod(Label(series, "le"), &edge)) {
      cumulative[1e3 * edge] += value;
    }
  }
  Buckets buckets;
  double below = 0;
  for (const auto& [edge_ms, count] : cumulative) {
    buckets.edges_ms.push_back(edge_ms);
    buckets.counts.push_back(count - below);
    below = count;
  }
  return buckets;
}

struct Latency {
  const char* key;
  const char* metric;
  const char* name;
};
constexpr Latency kLatencies[] = {
    {"ttft", "dejavu_time_to_first_token_seconds", "time to first token"},
    {"itl", "dejavu_inter_token_latency_seconds", "between two tokens"},
    {"e2el", "dejavu_request_duration_seconds", "whole request"},
};

void CompareCounts(const Json& totals, const std::map<std::string, double>& server_by_code, double server_prompt_tokens,
                   double server_tokens, Json* checks) {
  const Json by_code = totals.value("by_code", Json::object());
  std::set<std::string> codes;
  for (const auto& [code, count] : by_code.items()) codes.insert(code);
  for (const auto& [code, count] : server_by_code) codes.insert(code);
  for (const std::string& code : codes) {
    const double client = Number(by_code, code).value_or(0);
    const auto found = server_by_code.find(code);
    const double server = found == server_by_code.end() ? 0 : found->second;
    checks->push_back(
        {{"what", "requests, " + code}, {"client", client}, {"server", server}, {"agrees", client == server}});
  }
  // Of a request that did not end well, the server may have worked on more than its client heard of.
  const bool lost = Number(by_code, "OK").value_or(0) < Number(totals, "requests").value_or(0);
  for (const auto& [key, name, server] : {std::tuple("prompt_tokens", "prompt tokens", server_prompt_tokens),
                                          std::tuple("tokens", "output tokens", server_tokens)}) {
    const std::optional<double> client = Number(totals, key);
    if (!client.has_value()) continue;
    const bool agrees = lost ? *client <= server : *client == server;
    checks->push_back({{"what", name}, {"client", *client}, {"server", server}, {"agrees", agrees}});
  }
}

void ComparePercentiles(const Latency& latency, const Buckets& buckets, const Json& run, Json* checks) {
  Buckets fine;  // 1 % wide
  for (const Json& bucket : run.value("histograms", Json::object()).value(latency.key, Json::array())) {
    fine.edges_ms.push_back(bucket.at(0).get<double>());
    fine.counts.push_back(bucket.at(1).get<double>());
  }
  for (const auto& [name, share] : {std::pair("p50", 0.5), std::pair("p90", 0.9), std::pair("p99", 0.99)}) {
    // By the same rule on both sides: nothing is interpolated, which with few requests would differ.
    const std::optional<size_t> seen = fine.Reach(share), reached = buckets.Reach(share);
    if (!seen.has_value() || !reached.has_value()) continue;
    const double client_ms = fine.edges_ms[*seen];
    const size_t own = buckets.Holds(client_ms);
    const double upper_ms = buckets.edges_ms[*reached];
    checks->push_back({{"what", absl::StrCat(latency.name, ", ", name, ", ms")},
                       {"client", client_ms},
                       {"server",
                        {*reached == 0 ? 0.0 : buckets.edges_ms[*reached - 1],
                         upper_ms < std::numeric_limits<double>::infinity() ? Json(upper_ms) : Json()}},
                       {"agrees", std::max(own, *reached) - std::min(own, *reached) <= 1}});
  }
}

}  // namespace

MetricsSnapshot ParseMetrics(absl::string_view text) {
  MetricsSnapshot samples;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    if (line.front() == '#') continue;
    const size_t labels_end = line.rfind('}');
    const size_t space = line.find(' ', labels_end == absl::string_view::npos ? 0 : labels_end);
    double value;
    if (space == absl::string_view::npos || !absl::SimpleAtod(line.substr(space + 1), &value)) continue;
    samples[std::string(line.substr(0, space))] = value;
  }
  return samples;
}

absl::StatusOr<MetricsSnapshot> ScrapeMetrics(const std::string& url) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  std::optional<double> calls;
  while (true) {
    const absl::StatusOr<std::string> text = Get(url);
    if (!text.ok()) return text.status();
    MetricsSnapshot samples = ParseMetrics(*text);
    const double now = Total(samples, "dejavu_requests_total");
    if (calls == now || std::chrono::steady_clock::now() > deadline) return samples;
    calls = now;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

Json CompareWithServer(const MetricsSnapshot& before, const MetricsSnapshot& after, const Json& run) {
  MetricsSnapshot between = after;
  for (const auto& [series, value] : before) {
    if (const auto found = between.find(series); found != between.end()) found->second -= value;
  }
  MetricsSnapshot streams;  // other methods are none of the load
  for (const auto& [series, value] : between) {
    if (IsOf(series, "dejavu_requests_total") && Label(series, "method") == "GenerateStream")
      streams.emplace(series, value);
  }
  const std::map<std::string, double> by_code = TotalBy(streams, "dejavu_requests_total", "code");
  const double prompt_tokens = Total(between, "dejavu_prompt_tokens_total");
  const double cached_tokens = Total(between, "dejavu_prefix_cache_hit_tokens_total");
  const double tokens = Total(between, "dejavu_generated_tokens_total");
  Json metrics = {
      {"requests_by_code", by_code},    {"rejected", TotalBy(between, "dejavu_requests_rejected_total", "reason")},
      {"prompt_tokens", prompt_tokens}, {"cached_prompt_tokens", cached_tokens},
      {"generated_tokens", tokens},     {"preemptions", Total(between, "dejavu_preemptions_total")}};
  Json checks = Json::array();
  CompareCounts(run.value("totals", Json::object()), by_code, prompt_tokens + cached_tokens, tokens, &checks);
  for (const Latency& latency : kLatencies) {
    const Buckets buckets = FindBuckets(between, latency.metric);
    Json& histogram = metrics["histograms"][latency.key] = Json::array();
    for (size_t i = 0; i < buckets.counts.size(); ++i) {
      if (buckets.counts[i] == 0) continue;
      const bool last = i + 1 == buckets.counts.size();
      histogram.push_back({last ? Json() : Json(buckets.edges_ms[i]), buckets.counts[i]});
    }
    ComparePercentiles(latency, buckets, run, &checks);
  }
  return {{"metrics", std::move(metrics)}, {"crosscheck", std::move(checks)}};
}

}  // namespace dejavu
