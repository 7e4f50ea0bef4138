// `dejavu-bench serve`: the cost of serving. The same tokens come from the engine called directly, and through the real
// server and a gRPC client.
//
// Rounds of runs, the engine and then each API, so that a neighbour's load on the machine meets all of them. Both sides
// run in this process, as server and client would on one machine; clients are the generated synchronous ones.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dejavu/v1/generation.grpc.pb.h"
#include "engine/engine.h"
#include "engine/eval/tool.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "grpcpp/create_channel.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "server/server.h"
#include "tests/bench/api_client.h"
#include "tests/bench/flags.h"
#include "tests/bench/processor_time.h"
#include "tests/bench/scraper.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"
#include "tests/engine/serving/finish_sink.h"

namespace dejavu {
namespace {

struct ServeOptions : ModelFlags {
  int tokens = 256;
  int repeats = 15;
  std::vector<std::string> apis = {kApis.front()};
  std::string json;
};

double Microseconds(SteadyTime::duration d) { return std::chrono::duration<double, std::micro>(d).count(); }

struct Run {
  double ttft_us = 0;
  double per_token_us = 0;      // mean time between tokens after the first
  double per_token_cpu_us = 0;  // processor time of server and client, without the engine's threads
};

Run Summarise(SteadyTime start, SteadyTime first, SteadyTime last, int tokens) {
  return {Microseconds(first - start), Microseconds(last - first) / (tokens - 1), 0};
}

class TimingSink final : public FinishSink {
 public:
  bool OnToken(const Token&) override {
    last_ = std::chrono::steady_clock::now();
    if (tokens_++ == 0) first_ = last_;
    return true;
  }
  Run Wait(SteadyTime start) {
    WaitForFinish();
    return Summarise(start, first_, last_, tokens_);
  }

 private:
  SteadyTime first_, last_;
  int tokens_ = 0;
};

const std::vector<int32_t> kPrompt = {2, 10, 20, 30, 40, 50, 60, 70};

absl::StatusOr<Run> RunEngine(Engine& engine, int tokens) {
  Request request;
  request.prompt = kPrompt;
  request.max_new_tokens = tokens;
  request.ignore_eos = true;
  auto sink = std::make_shared<TimingSink>();
  const SteadyTime start = std::chrono::steady_clock::now();
  const auto id = engine.Submit(std::move(request), sink);
  if (!id.ok()) return id.status();
  return sink->Wait(start);
}

// The gaps between tokens go to `gaps_us`, if not null.
absl::StatusOr<Run> RunServer(ApiClient& client, int tokens, std::vector<double>* gaps_us = nullptr) {
  SteadyTime first, last;
  int count = 0;
  const SteadyTime start = std::chrono::steady_clock::now();
  const grpc::Status status = client.Stream(tokens, [&](int arrived) {
    const SteadyTime now = std::chrono::steady_clock::now();
    if (count == 0) first = last = now;
    for (int i = count == 0 ? 1 : 0; gaps_us != nullptr && i < arrived; ++i) {
      gaps_us->push_back(Microseconds(now - last));  // tokens of one message came at once
      last = now;
    }
    last = now;
    count += arrived;
  });
  if (!status.ok()) return absl::UnknownError(status.error_message());
  if (count != tokens) return absl::InternalError(absl::StrCat(count, " tokens came; ", tokens, " were asked for"));
  return Summarise(start, first, last, count);
}

// A client that asks for much and reads it, or nothing after its first token, until it is told to go.
class Mate {
 public:
  Mate(const std::shared_ptr<grpc::Channel>& channel, int tokens, bool reads)
      : stub_(v1::GenerationService::NewStub(channel)) {
    v1::GenerateRequest request = OwnRequest(kPrompt, tokens);
    request.mutable_output()->set_top_logprobs(100);
    reader_ = stub_->GenerateStream(&context_, request);
    v1::GenerateChunk chunk;
    reader_->Read(&chunk);
    if (reads) {
      thread_ = std::thread([this] {
        v1::GenerateChunk rest;
        while (reader_->Read(&rest)) {
        }
      });
    }
  }
  ~Mate() {
    context_.TryCancel();
    if (thread_.joinable()) thread_.join();
    (void)reader_->Finish();
  }

 private:
  const std::unique_ptr<v1::GenerationService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::GenerateChunk>> reader_;
  std::thread thread_;
};

// The 99th percentile of a stream's gaps beside a mate of either kind, in turns.
absl::Status BesideSlowReader(const ServeOptions& options, ApiClient& client, const std::string& address,
                              nlohmann::json* json) {
  std::vector<double> p99_us[2];
  for (int i = 0; i < options.repeats; ++i) {
    for (const bool reads : {true, false}) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
      arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
      const Mate mate(grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments), options.tokens,
                      reads);
      std::vector<double> gaps;
      RETURN_IF_ERROR(RunServer(client, options.tokens, &gaps).status());
      std::sort(gaps.begin(), gaps.end());
      p99_us[reads].push_back(gaps[gaps.size() * 99 / 100]);
    }
  }
  std::printf("p99 of a stream's gaps: %.1f us beside one that is read, %.1f us beside one that is not.\n",
              Median(p99_us[true]), Median(p99_us[false]));
  (*json)["p99_us_beside_reader"] = Median(p99_us[true]);
  (*json)["p99_us_beside_slow_reader"] = Median(p99_us[false]);
  return absl::OkStatus();
}

// What the second of two ways costs, in pairs of runs: the median of the ratios less 1, with an interval that holds the
// true median in 95 of 100 cases.
absl::Status PrintPairs(const char* what, int pairs, const std::function<absl::StatusOr<Run>()>& first,
                        const std::function<absl::StatusOr<Run>()>& second, nlohmann::json* json) {
  std::vector<double> shares;
  for (int i = 0; i < pairs; ++i) {
    // Which of both goes first alternates, too.
    absl::StatusOr<Run> a = i % 2 == 0 ? first() : second(), b = i % 2 == 0 ? second() : first();
    if (!a.ok()) return a.status();
    if (!b.ok()) return b.status();
    if (i % 2 == 1) std::swap(*a, *b);
    shares.push_back(b->per_token_us / a->per_token_us - 1.0);
  }
  std::sort(shares.begin(), shares.end());
  const auto reach = static_cast<int>(0.98 * std::sqrt(pairs));
  const double low = shares[std::max(0, pairs / 2 - reach)], high = shares[std::min(pairs - 1, pairs / 2 + reach)];
  std::printf("%-52s %+6.2f %%  (95 %%: %+.2f to %+.2f; %d pairs)\n", what, 100 * Median(shares), 100 * low, 100 * high,
              pairs);
  (*json)[what] = {{"share", Median(shares)}, {"low", low}, {"high", high}, {"pairs", pairs}};
  return absl::OkStatus();
}

// Runs without scrapes are short, so that other work of this machine falls into few of them.
absl::Status Watched(const ServeOptions& options, Engine& engine, int metrics_port, nlohmann::json* json) {
  constexpr int kPairs = 60, kShortPairs = 500, kShortTokens = 32, kScrapesPerSecond = 20;
  const auto plain = [&] { return RunEngine(engine, options.tokens); };
  const double scrape_ms = Scraper::CpuMs(metrics_port);
  std::printf("\nA scrape takes %.3f ms of the server's processor time: %d a second take %.2f %% of one CPU.\n",
              scrape_ms, kScrapesPerSecond, 100e-3 * kScrapesPerSecond * scrape_ms);
  (*json)["scrape_cpu_ms"] = scrape_ms;
  const auto scraped = [&] {
    const Scraper scraper(metrics_port, kScrapesPerSecond);
    return RunEngine(engine, options.tokens);
  };
  std::printf("\nTime per token with the second against the first:\n");
  RETURN_IF_ERROR(PrintPairs("nobody asks / 20 scrapes a second", kPairs, plain, scraped, json));
  const auto counting = [&](bool counts) {
    return [&engine, counts] {
      engine.SetCounting(counts);
      return RunEngine(engine, kShortTokens);
    };
  };
  return PrintPairs("the engine counts nothing / it counts", kShortPairs, counting(false), counting(true), json);
}

// By round.
struct Rounds {
  std::vector<Run> engine;
  std::vector<std::vector<Run>> served;  // by API
};

absl::StatusOr<Rounds> MeasureRounds(const ServeOptions& options, Engine& engine,
                                     const std::vector<std::unique_ptr<ApiClient>>& clients,
                                     const ProcessorTimeBeside& processor_time) {
  Rounds rounds{{}, std::vector<std::vector<Run>>(clients.size())};
  for (int i = -1; i < options.repeats; ++i) {  // one round to warm up
    ASSIGN_OR_RETURN(const Run direct, RunEngine(engine, options.tokens));
    if (i >= 0) rounds.engine.push_back(direct);
    for (size_t turn = 0; turn < clients.size(); ++turn) {
      const size_t api = (turn + static_cast<size_t>(i + 1)) % clients.size();  // each is the first in its turn
      const double start_ms = processor_time.Ms();
      ASSIGN_OR_RETURN(Run served, RunServer(*clients[api], options.tokens));
      served.per_token_cpu_us = 1e3 * (processor_time.Ms() - start_ms) / options.tokens;
      if (i >= 0) rounds.served[api].push_back(served);
    }
    std::fprintf(stderr, "\r%d of %d", i + 1, options.repeats);
  }
  std::fprintf(stderr, "\r                \r");
  return rounds;
}

std::vector<double> Of(const std::vector<Run>& runs, double Run::*figure) {
  std::vector<double> values;
  values.reserve(runs.size());
  for (const Run& run : runs) values.push_back(run.*figure);
  return values;
}

// By round: how much more the first take.
std::vector<double> Added(const std::vector<Run>& runs, const std::vector<Run>& base, double Run::*figure) {
  std::vector<double> added;
  for (size_t i = 0; i < runs.size(); ++i) added.push_back(runs[i].*figure - base[i].*figure);
  return added;
}

// The median of the rounds' shares.
double AddedShare(const std::vector<double>& added, const std::vector<Run>& base) {
  std::vector<double> shares;
  for (size_t i = 0; i < added.size(); ++i) shares.push_back(added[i] / base[i].per_token_us);
  return Median(shares);
}

void PrintFigure(const std::string& name, const std::vector<double>& us) {
  std::printf("%-34s %10.1f %10.1f %10.1f\n", name.c_str(), Median(us), Least(us), Most(us));
}

void Report(const ServeOptions& options, const std::string& backend, const Rounds& rounds, nlohmann::json* json) {
  std::printf("%s\n%s, batch 1, %d tokens, %d rounds of runs\n\n", options.model.c_str(), backend.c_str(),
              options.tokens, options.repeats);
  std::printf("%-34s %10s %10s %10s\n", "microseconds", "median", "least", "most");
  *json = {{"model", options.model},
           {"synthetic", IsSynthetic(options.model)},
           {"backend", backend},
           {"tokens", options.tokens}};
  const std::vector<Run>& own = rounds.served.front();
  const std::vector<double> added = Added(own, rounds.engine, &Run::per_token_us);
  for (const auto& [name, us] :
       {std::pair("engine_us_per_token", Of(rounds.engine, &Run::per_token_us)),
        std::pair("server_us_per_token", Of(own, &Run::per_token_us)), std::pair("added_us_per_token", added),
        std::pair("engine_ttft_us", Of(rounds.engine, &Run::ttft_us)),
        std::pair("server_ttft_us", Of(own, &Run::ttft_us))}) {
    PrintFigure(name, us);
    (*json)[name] = Median(us);
  }
  (*json)["added_share"] = AddedShare(added, rounds.engine);
  std::printf("\nThe server adds %.1f us, %.2f %%, to a token.\n", Median(added),
              100 * AddedShare(added, rounds.engine));
}

// Ours is the base. Neighbours of the machine move times, and processor time hardly.
void ReportApis(const ServeOptions& options, const Rounds& rounds, nlohmann::json* json) {
  static constexpr struct {
    const char *title, *name;
    double Run::*figure;
  } kFigures[] = {{"time per token", "us_per_token", &Run::per_token_us},
                  {"time to the first token", "ttft_us", &Run::ttft_us},
                  {"processor time per token", "cpu_us_per_token", &Run::per_token_cpu_us}};
  nlohmann::json& rows = (*json)["apis"];
  for (const std::string& api : options.apis) rows.push_back({{"api", api}});
  for (const auto& [title, name, figure] : kFigures) {
    std::printf("\n%-34s %10s %10s %10s %10s\n", absl::StrCat(title, ", us").c_str(), "median", "over ours", "least",
                "most");
    for (size_t api = 0; api < options.apis.size(); ++api) {
      const double us = Median(Of(rounds.served[api], figure));
      const std::vector<double> over = Added(rounds.served[api], rounds.served.front(), figure);
      std::printf("%-34s %10.1f %+10.2f %+10.2f %+10.2f\n", options.apis[api].c_str(), us, Median(over), Least(over),
                  Most(over));
      rows[api][name] = us;
      rows[api][absl::StrCat("over_own_", name)] = Median(over);
      rows[api][absl::StrCat("over_own_", name, "_least")] = Least(over);
      rows[api][absl::StrCat("over_own_", name, "_most")] = Most(over);
    }
  }
}

absl::Status Bench(const ServeOptions& options) {
  RETURN_IF_ERROR(CheckWritable(options.json));
  const EngineOptions engine_options = EngineOptionsOf(options);
  ASSIGN_OR_RETURN(const auto engine, Engine::Create(engine_options, 0, nullptr));
  const ProcessorTimeBeside processor_time;  // beside the engine's threads
  ServerOptions server_options;
  server_options.metrics_listen = "127.0.0.1:0";
  server_options.listen = "127.0.0.1:0";
  server_options.speculation_mode = "off";  // a token a message
  ASSIGN_OR_RETURN(const auto server, Server::Start(server_options, engine_options));
  server->SetReady(engine.get(), nullptr);
  const std::string address = absl::StrCat("127.0.0.1:", server->port());
  const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  std::vector<std::unique_ptr<ApiClient>> clients;
  for (const std::string& api : options.apis) {
    clients.push_back(MakeApiClient(api, channel, server->model_name(), kPrompt));
  }

  nlohmann::json json;
  ASSIGN_OR_RETURN(const Rounds rounds, MeasureRounds(options, *engine, clients, processor_time));
  Report(options, engine->backend_description(), rounds, &json);
  if (clients.size() > 1) {
    ReportApis(options, rounds, &json);
  } else {
    RETURN_IF_ERROR(BesideSlowReader(options, *clients.front(), address, &json));
    RETURN_IF_ERROR(Watched(options, *engine, server->metrics_port(), &json));
  }
  return WriteJson(options.json, json);
}

}  // namespace

Subcommand AddServe(CLI::App& program) {
  const auto options = std::make_shared<ServeOptions>();
  CLI::App* const command =
      AddMeasuring(program, "serve",
                   "What the server adds to a token: GenerateStream over loopback against the bare engine; and other "
                   "APIs against it",
                   *options);
  AddModel(command, *options);
  command->add_option("--tokens", options->tokens, "Tokens of one measurement")
      ->check(CLI::Range(2, 100000))
      ->capture_default_str();
  command
      ->add_option("--api", options->apis,
                   "APIs beside each other, such as dejavu,kserve,vllm; ours is always measured. With several, nothing "
                   "but these")
      ->delimiter(',')
      ->check(CLI::IsMember(kApis))
      ->default_str(kApis.front());
  return {command, [options] {
            // Ours first, and each once.
            std::vector<std::string> apis;
            for (const std::string& api : kApis) {
              const bool named = std::find(options->apis.begin(), options->apis.end(), api) != options->apis.end();
              if (named || api == kApis.front()) apis.push_back(api);
            }
            options->apis = std::move(apis);
            return ExitCode(Bench(*options));
          }};
}

}  // namespace dejavu
