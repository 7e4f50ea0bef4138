// `dejavu-bench serve`: the cost of serving. The same tokens come from the engine called directly, and through the real
// server and a gRPC client.
//
// Pairs of runs, engine then server, so that a neighbour's load on the machine meets both. Both sides run in this
// process, as server and client would on one machine; the client is the generated synchronous one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <thread>
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
#include "tests/bench/flags.h"
#include "tests/bench/scraper.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"
#include "tests/engine/serving/finish_sink.h"

namespace dejavu {
namespace {

struct ServeOptions : ModelFlags {
  int tokens = 256;
  int repeats = 15;
  std::string json;
};

double Microseconds(SteadyTime::duration d) { return std::chrono::duration<double, std::micro>(d).count(); }

struct Run {
  double ttft_us = 0;
  double per_token_us = 0;  // mean time between tokens after the first
};

Run Summarise(SteadyTime start, SteadyTime first, SteadyTime last, int tokens) {
  return {Microseconds(first - start), Microseconds(last - first) / (tokens - 1)};
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

v1::GenerateRequest RequestOf(int tokens) {
  v1::GenerateRequest request;
  for (int32_t id : kPrompt) request.mutable_token_ids()->add_ids(id);
  request.mutable_stopping()->set_max_new_tokens(tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

// The gaps between tokens go to `gaps_us`, if not null.
absl::StatusOr<Run> RunServer(v1::GenerationService::Stub& stub, int tokens, std::vector<double>* gaps_us = nullptr) {
  grpc::ClientContext context;
  const SteadyTime start = std::chrono::steady_clock::now();
  const auto reader = stub.GenerateStream(&context, RequestOf(tokens));
  v1::GenerateChunk chunk;
  SteadyTime first, last;
  int count = 0;
  while (reader->Read(&chunk)) {
    if (chunk.token_ids().empty()) continue;
    const SteadyTime now = std::chrono::steady_clock::now();
    if (count == 0) first = last = now;
    for (int i = count == 0 ? 1 : 0; gaps_us != nullptr && i < chunk.token_ids_size(); ++i) {
      gaps_us->push_back(Microseconds(now - last));  // tokens of one message came at once
      last = now;
    }
    last = now;
    count += chunk.token_ids_size();
  }
  const grpc::Status status = reader->Finish();
  if (!status.ok()) return absl::UnknownError(status.error_message());
  return Summarise(start, first, last, count);
}

// A client that asks for much and reads it, or nothing after its first token, until it is told to go.
class Mate {
 public:
  Mate(const std::shared_ptr<grpc::Channel>& channel, int tokens, bool reads)
      : stub_(v1::GenerationService::NewStub(channel)) {
    v1::GenerateRequest request = RequestOf(tokens);
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
absl::Status BesideSlowReader(const ServeOptions& options, v1::GenerationService::Stub& stub,
                              const std::string& address, nlohmann::json* json) {
  std::vector<double> p99_us[2];
  for (int i = 0; i < options.repeats; ++i) {
    for (const bool reads : {true, false}) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
      arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
      const Mate mate(grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments), options.tokens,
                      reads);
      std::vector<double> gaps;
      RETURN_IF_ERROR(RunServer(stub, options.tokens, &gaps).status());
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

// By pair of runs.
struct Pairs {
  std::vector<double> engine_us, server_us, added_us;  // per token
  std::vector<double> engine_ttft_us, server_ttft_us;
};

absl::StatusOr<Pairs> MeasurePairs(const ServeOptions& options, Engine& engine, v1::GenerationService::Stub& stub) {
  Pairs pairs;
  for (int i = -1; i < options.repeats; ++i) {  // one pair to warm up
    ASSIGN_OR_RETURN(const Run direct, RunEngine(engine, options.tokens));
    ASSIGN_OR_RETURN(const Run served, RunServer(stub, options.tokens));
    std::fprintf(stderr, "\r%d of %d", i + 1, options.repeats);
    if (i < 0) continue;
    pairs.engine_us.push_back(direct.per_token_us);
    pairs.server_us.push_back(served.per_token_us);
    pairs.added_us.push_back(served.per_token_us - direct.per_token_us);
    pairs.engine_ttft_us.push_back(direct.ttft_us);
    pairs.server_ttft_us.push_back(served.ttft_us);
  }
  std::fprintf(stderr, "\r                \r");
  return pairs;
}

void Report(const ServeOptions& options, const std::string& backend, const Pairs& pairs, nlohmann::json* json) {
  std::printf("%s\n%s, batch 1, %d tokens, %d pairs of runs\n\n", options.model.c_str(), backend.c_str(),
              options.tokens, options.repeats);
  std::printf("%-34s %10s %10s %10s\n", "microseconds", "median", "least", "most");
  *json = {{"model", options.model},
           {"synthetic", IsSynthetic(options.model)},
           {"backend", backend},
           {"tokens", options.tokens}};
  for (const auto& [name, us] :
       {std::pair("engine_us_per_token", &pairs.engine_us), std::pair("server_us_per_token", &pairs.server_us),
        std::pair("added_us_per_token", &pairs.added_us), std::pair("engine_ttft_us", &pairs.engine_ttft_us),
        std::pair("server_ttft_us", &pairs.server_ttft_us)}) {
    std::printf("%-34s %10.1f %10.1f %10.1f\n", name, Median(*us), Least(*us), Most(*us));
    (*json)[name] = Median(*us);
  }
  std::vector<double> shares;  // of neighbouring runs
  for (size_t i = 0; i < pairs.added_us.size(); ++i) shares.push_back(pairs.added_us[i] / pairs.engine_us[i]);
  (*json)["added_share"] = Median(shares);
  std::printf("\nThe server adds %.1f us, %.2f %%, to a token.\n", Median(pairs.added_us), 100 * Median(shares));
}

absl::Status Bench(const ServeOptions& options) {
  RETURN_IF_ERROR(CheckWritable(options.json));
  const EngineOptions engine_options = EngineOptionsOf(options);
  ASSIGN_OR_RETURN(const auto engine, Engine::Create(engine_options, 0, nullptr));
  ServerOptions server_options;
  server_options.metrics_listen = "127.0.0.1:0";
  server_options.listen = "127.0.0.1:0";
  ASSIGN_OR_RETURN(const auto server, Server::Start(server_options, engine_options));
  server->SetReady(engine.get(), nullptr);
  const std::string address = absl::StrCat("127.0.0.1:", server->port());
  const auto stub = v1::GenerationService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));

  nlohmann::json json;
  ASSIGN_OR_RETURN(const Pairs pairs, MeasurePairs(options, *engine, *stub));
  Report(options, engine->backend_description(), pairs, &json);
  RETURN_IF_ERROR(BesideSlowReader(options, *stub, address, &json));
  RETURN_IF_ERROR(Watched(options, *engine, server->metrics_port(), &json));
  return WriteJson(options.json, json);
}

}  // namespace

Subcommand AddServe(CLI::App& program) {
  const auto options = std::make_shared<ServeOptions>();
  CLI::App* const command =
      AddMeasuring(program, "serve",
                   "What the server adds to a token: GenerateStream over loopback against the bare engine", *options);
  AddModel(command, *options);
  command->add_option("--tokens", options->tokens, "Tokens of one measurement")
      ->check(CLI::Range(2, 100000))
      ->capture_default_str();
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
