#include "loadtest/generator/report.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "loadtest/generator/knee.h"

namespace dejavu {
namespace {

Json Part(const Json& run, const char* key) { return run.value(key, Json::object()); }

std::string Loop(const Json& run) {
  if (Text(run, "loop") == "closed") {
    return absl::StrCat("closed loop, ", Short(Number(run, "max_concurrency")),
                        " at a time: who would have come during a stall is missing in these percentiles");
  }
  const Json arrivals = Part(run, "arrivals");
  std::string kind = Text(arrivals, "kind");
  if (kind == "gamma") absl::StrAppend(&kind, " (burstiness ", Short(Number(arrivals, "burstiness")), ")");
  return absl::StrCat("open loop, ", kind, " arrivals: latency counts from when a request was due");
}

std::string Objectives(const Json& objectives) {
  std::vector<std::string> wishes;
  for (const auto& [key, name] : {std::pair("ttft_ms", "TTFT"), std::pair("tpot_ms", "TPOT"),
                                  std::pair("itl_p99_ms", "p99 ITL"), std::pair("e2el_ms", "E2E")}) {
    if (const auto limit_ms = Number(objectives, key))
      wishes.push_back(absl::StrCat(name, " <= ", Short(limit_ms), " ms"));
  }
  return absl::StrJoin(wishes, ", ");
}

std::string Counts(const Json& counts) {
  std::vector<std::string> parts;
  for (const auto& [name, count] : counts.items())
    parts.push_back(absl::StrCat(name, " ", Short(Number(counts, name))));
  return absl::StrJoin(parts, ", ");
}

// Rows that differ are shown, those that agree are counted.
std::string CrossCheck(const Json& checks) {
  std::string text;
  int agreeing = 0;
  for (const Json& check : checks) {
    if (check.value("agrees", false)) {
      ++agreeing;
    } else {
      absl::StrAppend(&text, "  differs: ", Text(check, "what"), ": client ", check.value("client", Json()).dump(),
                      ", server ", check.value("server", Json()).dump(), "\n");
    }
  }
  return absl::StrFormat("server: %d of %d comparisons with its metrics agree\n%s", agreeing, checks.size(), text);
}

std::string Verdict(const Json& run) {
  if (run.value("valid", false)) return "";
  std::string text = "INVALID: the generator did not do what it was told; the figures say nothing about the server\n";
  for (const Json& reason : run.value("invalid_because", Json::array())) {
    absl::StrAppend(&text, "  ", reason.is_string() ? reason.get<std::string>() : reason.dump(), "\n");
  }
  return text;
}

std::string Requests(const Json& run) {
  std::string text = absl::StrCat("requests   ", Short(Number(run, "completed")), " answered of ",
                                  Short(Number(run, "num_prompts")), ", ", Short(Number(run, "failed").value_or(0)),
                                  " failed, in ", Short(Number(run, "duration")), " s\n");
  const Json by_code = Part(run, "by_code");
  if (by_code.size() > 1 || !by_code.contains("OK")) absl::StrAppend(&text, "           ", Counts(by_code), "\n");
  if (const auto offered = Number(run, "offered_rate")) {
    absl::StrAppend(&text, "rate       ", Short(offered), "/s offered, ", Short(Number(run, "achieved_rate")),
                    "/s sent\n");
  }
  absl::StrAppend(&text, "answered   ", Short(Number(run, "request_throughput")), " requests/s, ",
                  Short(Number(run, "output_throughput")), " tokens/s\n");
  if (const std::string objectives = Objectives(Part(run, "objectives")); !objectives.empty()) {
    absl::StrAppend(&text, "goodput    ", Short(Number(run, "request_goodput")), "/s, ",
                    Percent(Number(run, "goodput_share")), " of the requests: ", objectives, "\n");
  }
  return text;
}

std::string Latencies(const Json& run) {
  std::string text =
      absl::StrFormat("%-20s %8s %8s %8s %8s %8s %8s %8s\n", "ms", "mean", "p50", "p90", "p95", "p99", "p99.9", "max");
  for (const auto& [key, name] : {std::pair("ttft", "time to first token"), std::pair("itl", "between two tokens"),
                                  std::pair("tpot", "mean between tokens"), std::pair("e2el", "whole request")}) {
    absl::StrAppendFormat(&text, "%-20s", name);
    for (const char* what : {"mean", "p50", "p90", "p95", "p99", "p99.9", "max"}) {
      absl::StrAppendFormat(&text, " %8s", Short(Number(run, absl::StrCat(what, "_", key, "_ms"))));
    }
    text += "\n";
  }
  return text;
}

std::string Generator(const Json& run) {
  const Json lag = Part(run, "lag_ms"), client = Part(run, "client");
  std::string text = "generator: ";
  if (const auto p99 = Number(lag, "p99")) {
    absl::StrAppend(&text, "lag p50 ", Short(Number(lag, "p50")), ", p99 ", Short(p99), ", max ",
                    Short(Number(lag, "max")), " ms; ", Short(Number(run, "dropped")), " dropped; ");
  }
  return absl::StrCat(text, Percent(Number(client, "cpu_share")), " of a CPU, ", Short(Number(client, "max_rss_mb")),
                      " MB\n");
}

}  // namespace

std::string ConsoleReport(const Json& run) {
  const std::string label = Text(run, "label");
  const Json checks = Part(run, "server").value("crosscheck", Json::array());
  return absl::StrCat(Verdict(run), Text(run, "model_id"), ", ", Backend(run), label.empty() ? "" : ", ", label, "\n",
                      Loop(run), "\n\n", Requests(run), "\n", Latencies(run), "\n", Generator(run),
                      checks.empty() ? "" : CrossCheck(checks));
}

std::string MarkdownReport(const std::vector<Json>& runs) {
  std::string out =
      "| | requests/s | goodput/s | tokens/s | first token, ms: p50, p99 | between tokens, ms: p50, p99 | density | "
      "what ends it |\n"
      "|---|---:|---:|---:|---:|---:|---:|---|\n";
  for (const Series& series : FindSeries(runs)) {
    if (series.loop != "open") continue;
    absl::StrAppend(&out, "| ", series.label, " | ");
    if (series.knee.has_value()) {
      const Json& at = runs[*series.knee];
      absl::StrAppend(&out, Short(Number(at, "offered_rate")), " | ", Short(Number(at, "request_goodput")), " | ",
                      Short(Number(at, "output_throughput")), " | ", Short(Number(at, "p50_ttft_ms")), ", ",
                      Short(Number(at, "p99_ttft_ms")), " | ", Short(Number(at, "p50_itl_ms")), ", ",
                      Short(Number(at, "p99_itl_ms")), " | ", Percent(MeanDensity(at)));
    } else {
      absl::StrAppend(&out, "none | | | | | ");
    }
    absl::StrAppend(&out, " | ",
                    series.ended_by.empty() ? "nothing, at the rates tried" : absl::StrJoin(series.ended_by, "; "),
                    " |\n");
  }
  return out;
}

}  // namespace dejavu
