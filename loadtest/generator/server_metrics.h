// What a dejavud counted during a run (its /metrics, see docs/operations/metrics.md) beside what the client saw.
#ifndef LOADTEST_GENERATOR_SERVER_METRICS_H_
#define LOADTEST_GENERATOR_SERVER_METRICS_H_

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "loadtest/generator/document.h"

namespace dejavu {

using MetricsSnapshot = std::map<std::string, double>;  // `name{labels}`, as the server writes it, to value

// `url` is http://HOST:PORT or http://HOST:PORT/PATH, by default /metrics. A call ends for its client a moment before
// the server has counted it: asks again, for up to a second, until two answers in a row count as many calls.
absl::StatusOr<MetricsSnapshot> ScrapeMetrics(const std::string& url);

// Prometheus' text format; lines that are no samples are skipped.
MetricsSnapshot ParseMetrics(absl::string_view text);

// {"metrics": what the server counted in between, "crosscheck": [{what, client, server, agrees}]}. Percentiles agree
// when the client's lies in the server's bucket or next to it: client and server stand at different ends of the
// network, and the client counts from when a request was due. Other clients in between make them differ.
Json CompareWithServer(const MetricsSnapshot& before, const MetricsSnapshot& after, const Json& run);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_SERVER_METRICS_H_
