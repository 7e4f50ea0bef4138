// dejavu-loadtest: loads a server and tells the truth about it.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/status/status.h"
#include "kernels/base/end_output.h"
#include "loadtest/client/channel.h"
#include "loadtest/generator/document.h"
#include "loadtest/generator/echo.h"
#include "loadtest/generator/options.h"
#include "loadtest/generator/page.h"
#include "loadtest/generator/report.h"
#include "loadtest/generator/run.h"

namespace {

using dejavu::Json;

constexpr char kFooter[] =
    "Exit codes: 0 done; 1 something could not be read or written; 2 wrong usage; 3 the server cannot be reached or "
    "takes\n"
    "no requests; 4 the run is INVALID: its figures say more about the generator than about the server; 130 "
    "interrupted.\n"
    "\n"
    "  dejavu-loadtest run --rate 20 --duration 60 --warmup-s 5 --goodput ttft:200 tpot:50 --json run.json --html "
    "run.html\n"
    "  dejavu-loadtest run --ramp 5:50:10 --duration 20 --tier balanced --json ramp.json\n"
    "  dejavu-loadtest report --html all.html run.json ramp.json";

std::atomic<bool> interrupted{false};

void Interrupt(int /*signal*/) {
  // The second one ends the process.
  if (interrupted.exchange(true)) ::_exit(dejavu::kLoadtestInterrupted);
}

void HandleSignals() {
  struct sigaction action = {};
  action.sa_handler = Interrupt;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

void AddServerFlags(CLI::App* run, dejavu::RunOptions* o) {
  const auto add = [&](const char* name, auto& value, const char* help) {
    return run->add_option(name, value, help)->capture_default_str()->group("Server");
  };
  add("--server", o->server, "HOST:PORT")->envname("DEJAVU_SERVER");
  add("--model", o->model, "Name of the model; without it, whichever is served");
  add("--connections", o->connections, "Connections, which take streams in turn; a server allows 256 on each")
      ->check(CLI::Range(1, 256));
  add("--wait-s", o->wait_s, "Wait for a server that is still loading")->check(CLI::Range(0.0, 3600.0));
  add("--metadata", o->metadata, "KEY=VALUE, sent with every call; may be repeated")->allow_extra_args(false);
  dejavu::AddChannelFlags(run, &o->channel);
}

void AddArrivalFlags(CLI::App* run, dejavu::RunOptions* o) {
  const auto add = [&](const char* name, auto& value, const char* help) {
    return run->add_option(name, value, help)->capture_default_str()->group("When");
  };
  add("--rate", o->rate, "Open loop: requests per second, whatever the server does")->check(CLI::Range(1e-3, 1e6));
  add("--ramp", o->ramp, "Open loop: FROM:TO:STEPS, a run at each rate, until one is not held");
  add("--concurrency", o->concurrency, "Closed loop: so many at a time, the next when one has ended")
      ->check(CLI::Range(1, 65536));
  add("--replay", o->replay,
      "Open loop: the times, lengths, seeds and tiers of a CSV or JSONL file or of a daemon's log");
  add("--replay-speed", o->replay_speed, "So many times as fast")->check(CLI::Range(1e-3, 1e3));
  add("--arrivals", o->arrivals, "Of an open loop; as many as rate times duration, at random times within it")
      ->check(CLI::IsMember({"constant", "poisson", "gamma"}));
  add("--burstiness", o->burstiness, "Shape of gamma: 1 is Poisson, less comes in bursts, more is more even")
      ->check(CLI::Range(0.01, 100.0));
  add("--seed", o->seed, "The same seed gives the same times and requests");
  add("--duration", o->duration_s, "Seconds of sending; without this and --requests, 30, or the whole replay")
      ->check(CLI::Range(0.01, 1e7));
  add("--requests", o->requests, "So many requests instead")->check(CLI::Range(int64_t{1}, int64_t{1} << 32));
  add("--warmup-s", o->warmup_s, "Seconds of the same load before; not measured")->check(CLI::Range(0.0, 1e5));
  add("--warmup-requests", o->warmup_requests, "So many requests before; not measured")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 32));
  add("--max-in-flight", o->max_in_flight, "Open loop: a send beyond so many is dropped, and the run INVALID")
      ->check(CLI::Range(1, 65536));
  add("--grace-s", o->grace_s, "After the last send, for what is still running")->check(CLI::Range(0.0, 1e5));
}

void AddRequestFlags(CLI::App* run, dejavu::RunOptions* o) {
  const auto add = [&](const char* name, auto& value, const char* help) {
    return run->add_option(name, value, help)->capture_default_str()->group("Requests");
  };
  add("--prompt-tokens", o->prompt_tokens, "N, uniform:LEAST:MOST or lognormal:MEDIAN:SIGMA:MOST");
  add("--output-tokens", o->output_tokens, "The same, of new tokens");
  add("--corpus", o->corpus, "Prompts are slices of this text, of about so many tokens; without it, random token ids");
  run->add_flag("--natural-eos", o->natural_eos, "Let the model end its texts; without it, lengths are exact")
      ->group("Requests");
  run->add_flag("--prefix-cache", o->prefix_cache, "Let the server reuse prefixes, which a second run then finds")
      ->group("Requests");
  add("--temperature", o->temperature, "0: always the most likely token")->check(CLI::Range(0.0, 100.0));
  add("--tier", o->tier, "dense, exact, high, balanced, fast, or a mix: dense=1,balanced=3");
  add("--urgency", o->urgency, "interactive, normal, batch, or a mix");
  add("--priority", o->priority, "-100 to 100, or a mix: 0=9,10=1");
  add("--tenant", o->tenant, "A name, or a mix");
  add("--timeout-s", o->timeout_s, "Deadline of each request, from its scheduled time; 0: none")
      ->check(CLI::Range(0.0, 1e5));
  add("--cancel-share", o->cancel_share, "Share of requests that are cancelled")->check(CLI::Range(0.0, 1.0));
  add("--cancel-after-tokens", o->cancel_after_tokens, "Once they have so many tokens")->check(CLI::Range(1, 1 << 20));
  add("--slow-reader-share", o->slow_reader_share, "Share of requests that are read slowly")
      ->check(CLI::Range(0.0, 1.0));
  add("--slow-reader-ms", o->slow_reader_ms, "Between two of their messages")->check(CLI::Range(0.0, 1e6));
  add("--bad-share", o->bad_share, "Share of requests that are wrong and must be refused")->check(CLI::Range(0.0, 1.0));
}

void AddReportFlags(CLI::App* run, dejavu::RunOptions* o) {
  const auto add = [&](const char* name, auto& value, const char* help) {
    return run->add_option(name, value, help)->capture_default_str()->group("Report");
  };
  add("--goodput", o->goodput, "What each request should keep to: ttft:MS tpot:MS itl_p99:MS e2el:MS");
  add("--label", o->label, "Name of the run in reports");
  add("--metrics", o->metrics, "http://HOST:PORT/metrics of the server, to check against");
  add("--json", o->json, "The result document, or with --ramp an array of them");
  add("--jsonl", o->jsonl, "A line for each request, written as they end");
  add("--html", o->html, "The report as a page");
  run->add_flag("--quiet", o->quiet, "No progress on stderr")->group("Report");
}

// Every flag as it was, given or not.
Json ConfigOf(const CLI::App& run) {
  Json config = Json::object();
  for (const CLI::Option* option : run.get_options()) {
    const std::string name = option->get_single_name();
    if (name == "help") continue;
    const std::vector<std::string>& given = option->results();
    if (option->get_expected_max() == 0) {
      config[name] = !given.empty();
    } else if (given.size() > 1) {
      config[name] = given;
    } else {
      config[name] = given.empty() ? option->get_default_str() : given[0];
    }
  }
  return config;
}

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "dejavu-loadtest: %s\n", std::string(status.message()).c_str());
  return code;
}

struct ReportOptions {
  std::vector<std::string> files;
  std::string html;
  bool markdown = false;
};

CLI::App* AddReport(CLI::App* program, ReportOptions* o) {
  CLI::App* const report = program->add_subcommand("report", "Show results of earlier runs, side by side");
  report->add_option("results", o->files, "What run --json wrote")->required();
  report->add_option("--html", o->html, "All of them on one page");
  report->add_flag("--markdown", o->markdown, "A table for a README instead of the text");
  return report;
}

int Report(const ReportOptions& options) {
  const auto runs = dejavu::ReadResults(options.files);
  if (!runs.ok()) return Fail(runs.status(), dejavu::kLoadtestFailed);
  if (options.markdown) {
    std::fputs(dejavu::MarkdownReport(*runs).c_str(), stdout);
  } else {
    for (const Json& run : *runs) std::fputs(dejavu::ConsoleReport(run).c_str(), stdout);
  }
  if (options.html.empty()) return dejavu::kLoadtestOk;
  const absl::Status written = dejavu::WriteFile(options.html, dejavu::HtmlPage(*runs));
  return written.ok() ? dejavu::kLoadtestOk : Fail(written, dejavu::kLoadtestFailed);
}

void AddEcho(CLI::App* program, dejavu::EchoOptions* o) {
  CLI::App* const echo = program->add_subcommand("echo", "Serve answers that cost nothing, to measure the generator");
  echo->group("");  // hidden
  echo->add_option("--listen", o->listen, "HOST:PORT")->capture_default_str();
  echo->add_option("--port-file", o->port_file, "File that gets the port");
  echo->add_option("--itl-ms", o->itl_ms, "Between two tokens; 0: all at once")->check(CLI::Range(0.0, 1e6));
}

int Main(int argc, char** argv) {
  CLI::App program("Loads dejavud and measures it", "dejavu-loadtest");
  program.set_version_flag("--version", "dejavu-loadtest " DEJAVU_VERSION);
  program.require_subcommand(1);
  program.footer(kFooter);

  dejavu::RunOptions options;
  CLI::App* const run = program.add_subcommand("run", "Send requests, measure, and report");
  AddArrivalFlags(run, &options);
  AddRequestFlags(run, &options);
  AddServerFlags(run, &options);
  AddReportFlags(run, &options);
  ReportOptions report_options;
  CLI::App* const report = AddReport(&program, &report_options);
  dejavu::EchoOptions echo_options;
  AddEcho(&program, &echo_options);

  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return program.exit(error) == 0 ? dejavu::kLoadtestOk : dejavu::kLoadtestUsage;  // 0: --help and --version
  }
  HandleSignals();
  if (report->parsed()) return Report(report_options);
  if (run->parsed()) return dejavu::Run(options, ConfigOf(*run), interrupted);
  const absl::Status served = dejavu::RunEcho(echo_options, interrupted);
  return served.ok() ? dejavu::kLoadtestOk : Fail(served, dejavu::kLoadtestUnavailable);
}

}  // namespace

int main(int argc, char** argv) { return dejavu::EndOutput("dejavu-loadtest", Main(argc, argv)); }
