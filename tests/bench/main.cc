// dejavu-bench: what this machine reaches. One subcommand for each question.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"
#include "tests/bench/allreduce.h"
#include "tests/bench/bandwidth.h"
#include "tests/bench/checkpoint.h"
#include "tests/bench/decode.h"
#include "tests/bench/imbalance.h"
#include "tests/bench/ops.h"
#include "tests/bench/prefill.h"
#include "tests/bench/ranks.h"
#include "tests/bench/schedule.h"
#include "tests/bench/serve.h"

namespace {

const std::vector<std::string> kTypes = {"bf16", "fp16", "fp32", "int8"};
const std::vector<std::string> kTiers = {"dense", "exact", "high", "balanced", "fast"};

// What all subcommands share.
template <typename Options>
CLI::App* Add(CLI::App& app, const char* name, const char* description, Options& options) {
  CLI::App* const command = app.add_subcommand(name, description);
  command->add_option("--threads", options.threads, "CPU threads; 0: all")->check(CLI::Range(0, 1024));
  command->add_option("--repeats", options.repeats, "Measurements of everything; figures are their medians")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--json", options.json, "Also write the figures to this file");
  return command;
}

template <typename Options>
void AddDevice(CLI::App* command, Options& options) {
  command->add_option("--device", options.device, "What computes: cpu, or cuda, the first GPU")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
}

template <typename Options>
void AddModel(CLI::App* command, Options& options) {
  std::vector<std::string> types = kTypes;
  types.push_back("stored");
  command->add_option("--model", options.model, "Model directory, or a synthetic model such as synthetic:opt-1.3b")
      ->required();
  command->add_option("--dtype", options.weights, "Type of the matrices in memory")
      ->check(CLI::IsMember(types))
      ->capture_default_str();
  AddDevice(command, options);
}

}  // namespace

int main(int argc, char** argv) {
  spdlog::set_default_logger(spdlog::stderr_logger_mt("dejavu-bench"));  // tables alone go to stdout
  CLI::App app("Measures dejavud on this machine. Figures are medians; compare ratios within one run.", "dejavu-bench");
  app.require_subcommand(1);

  dejavu::BandwidthBenchOptions bandwidth;
  CLI::App* command = Add(app, "bandwidth", "How fast this machine, or its GPU, reads memory now", bandwidth);
  AddDevice(command, bandwidth);
  command->add_option("--buffer-mib", bandwidth.buffer_mib, "What is read over and over")
      ->check(CLI::Range(4, 1 << 20))
      ->capture_default_str();

  dejavu::OpsBenchOptions ops;
  command = Add(app, "ops", "Each op of the CPU backend against bandwidth and arithmetic peak", ops);
  command->add_option("--hidden", ops.hidden, "Width of the layer")
      ->check(CLI::Range(64, 1 << 16))
      ->capture_default_str();
  command->add_option("--ffn", ops.ffn, "Neurons of the layer")->check(CLI::Range(64, 1 << 18))->capture_default_str();
  command->add_option("--dtype", ops.weights, "Type of the weights")
      ->check(CLI::IsMember(kTypes))
      ->capture_default_str();
  command->add_option("--batch", ops.batch, "Rows")->check(CLI::Range(1, 256))->capture_default_str();
  command->add_option("--working-set-mib", ops.working_set_mib, "Weights that an op goes through")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();

  dejavu::PrefillBenchOptions prefill;
  command = Add(app, "prefill", "How fast prompts go through a model", prefill);
  AddModel(command, prefill);
  command->add_option("--tokens", prefill.tokens, "Lengths of the prompts, such as 16,64,128,512")
      ->delimiter(',')
      ->check(CLI::Range(2, 1 << 20));

  dejavu::DecodeBenchOptions decode;
  command =
      Add(app, "decode", "What a decode step costs by tier, batch and context, and the weights that it reads", decode);
  AddModel(command, decode);
  command->add_option("--text", decode.text, "Text that is decoded: sparsity depends on it; without: random tokens");
  command->add_option("--predictor", decode.predictor, "Predictor file, or none; default: the model's own");
  command->add_option("--batch", decode.batches, "Sequences side by side, such as 1,4")
      ->delimiter(',')
      ->check(CLI::Range(1, 256));
  command->add_option("--context", decode.contexts, "Tokens before the first decoded one, such as 128,2048")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--tier", decode.tiers, "Such as exact,balanced; DENSE always runs beside them")
      ->delimiter(',')
      ->check(CLI::IsMember(kTiers));
  command->add_option("--steps", decode.steps, "Decode steps of one measurement; 0: as many as take half a second")
      ->check(CLI::Range(0, 1 << 20));

  dejavu::ServeBenchOptions serve;
  command =
      Add(app, "serve", "What the server adds to a token: GenerateStream over loopback against the bare engine", serve);
  AddModel(command, serve);
  command->add_option("--tokens", serve.tokens, "Tokens of one measurement")
      ->check(CLI::Range(2, 100000))
      ->capture_default_str();

  dejavu::ScheduleBenchOptions schedule;
  command =
      Add(app, "schedule",
          "What scheduling costs a step, what prompts do to the gaps between others' tokens, what a known prefix saves",
          schedule);
  AddModel(command, schedule);
  command->add_option("--prompt-tokens", schedule.prompt_tokens, "Of the prompts that arrive")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--seconds", schedule.seconds, "Of each measurement of gaps")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();

  dejavu::AllReduceBenchOptions all_reduce;
  command = app.add_subcommand("allreduce",
                               "How long ranks take to add up their values: threads, or the processes of mpirun");
  command->add_option("--ranks", all_reduce.ranks, "Threads; mpirun says how many there are")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  command->add_option("--repeats", all_reduce.repeats, "Measurements of everything; figures are their medians")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--json", all_reduce.json, "Also write the figures to this file");

  dejavu::RanksBenchOptions ranks;
  command =
      Add(app, "ranks",
          "A group of ranks beside one rank on the same CPUs: threads, or the processes of mpirun, which then needs "
          "--bind-to none so that one rank alone can use all CPUs",
          ranks);
  AddModel(command, ranks);
  command->add_option("--ranks", ranks.ranks, "Threads; mpirun says how many there are")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  command->add_option("--text", ranks.text, "Text that is decoded; without: random tokens");
  command->add_option("--predictor", ranks.predictor, "Predictor file, or none; default: the model's own");
  command->add_option("--batch", ranks.batches, "Sequences side by side, such as 1,4")
      ->delimiter(',')
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_option("--context", ranks.context, "Tokens before the first decoded one")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--tier", ranks.tiers, "Such as exact,balanced")
      ->delimiter(',')
      ->check(CLI::IsMember(kTiers))
      ->capture_default_str();
  command->add_option("--steps", ranks.steps, "Decode steps of one measurement; 0: as many as take half a second")
      ->check(CLI::Range(0, 1 << 20));

  dejavu::ImbalanceBenchOptions imbalance;
  command =
      app.add_subcommand("imbalance", "How evenly active neurons fall on ranks, by how neurons are dealt to them");
  command->add_option("--model", imbalance.model, "Model directory, or a synthetic model such as synthetic:opt-6.7b")
      ->required();
  command->add_option("--dtype", imbalance.weights, "Type of the matrices in memory")
      ->check(CLI::IsMember({"bf16", "fp16", "fp32", "int8", "stored"}))
      ->capture_default_str();
  command->add_option("--predictor", imbalance.predictor, "Predictor file, or none; default: the model's own");
  command->add_option("--text", imbalance.text, "Text that is decoded; without: random tokens");
  command->add_option("--ranks", imbalance.ranks, "Such as 2,4,8")
      ->delimiter(',')
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  command->add_option("--batch", imbalance.batches, "Sequences side by side, such as 1,4")
      ->delimiter(',')
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_option("--tier", imbalance.tiers, "Such as exact,balanced")
      ->delimiter(',')
      ->check(CLI::IsMember(kTiers))
      ->capture_default_str();
  command->add_option("--steps", imbalance.steps, "Decode steps of each tier and batch")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--window", imbalance.window, "Positions after which a sequence begins anew")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  command->add_option("--threads", imbalance.threads, "CPU threads; 0: all")->check(CLI::Range(0, 1024));
  command->add_option("--json", imbalance.json, "Also write the figures to this file");

  dejavu::CheckpointOptions checkpoint;
  command = app.add_subcommand("checkpoint", "Writes a synthetic model to disk, in Hugging Face layout");
  command->add_option("--model", checkpoint.model, "Such as synthetic:opt-1.3b")->required();
  command->add_option("--dtype", checkpoint.weights, "Type of the matrices")
      ->check(CLI::IsMember({"bf16", "fp16", "fp32", "stored"}))
      ->capture_default_str();
  command->add_option("--out", checkpoint.out, "Directory")->required();

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  try {
    if (app.got_subcommand("allreduce")) return dejavu::RunAllReduceBench(all_reduce);
    if (app.got_subcommand("bandwidth")) return dejavu::RunBandwidthBench(bandwidth);
    if (app.got_subcommand("imbalance")) return dejavu::RunImbalanceBench(imbalance);
    if (app.got_subcommand("ops")) return dejavu::RunOpsBench(ops);
    if (app.got_subcommand("prefill")) return dejavu::RunPrefillBench(prefill);
    if (app.got_subcommand("decode")) return dejavu::RunDecodeBench(decode);
    if (app.got_subcommand("ranks")) return dejavu::RunRanksBench(ranks);
    if (app.got_subcommand("schedule")) return dejavu::RunScheduleBench(schedule);
    if (app.got_subcommand("serve")) return dejavu::RunServeBench(serve);
    return dejavu::RunCheckpoint(checkpoint);
  } catch (const std::exception& error) {  // the device failed
    std::fprintf(stderr, "dejavu-bench: %s\n", error.what());
    return 1;
  }
}
