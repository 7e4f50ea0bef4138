// dejavu-bench: what this machine reaches. One subcommand for each question.
#include <string>

#include "CLI/CLI.hpp"
#include "tests/bench/bandwidth.h"
#include "tests/bench/decode.h"
#include "tests/bench/serve.h"

int main(int argc, char** argv) {
  CLI::App app("Measures dejavud on this machine. Figures are medians; compare ratios within one run.", "dejavu-bench");
  app.require_subcommand(1);

  dejavu::BandwidthBenchOptions bandwidth;
  CLI::App* bandwidth_command = app.add_subcommand("bandwidth", "How fast this machine reads memory now");
  bandwidth_command->add_option("--threads", bandwidth.threads, "CPU threads; 0: all")->check(CLI::Range(0, 1024));
  bandwidth_command->add_option("--repeats", bandwidth.repeats, "Measurements")->check(CLI::Range(1, 1000));
  bandwidth_command->add_option("--buffer-mib", bandwidth.buffer_mib, "What is read over and over")
      ->check(CLI::Range(4, 1 << 20));
  bandwidth_command->add_option("--json", bandwidth.json, "Also write the figures to this file");

  dejavu::ServeBenchOptions serve;
  CLI::App* serve_command = app.add_subcommand(
      "serve", "What the server adds to a token: GenerateStream over loopback against the bare engine");
  serve_command->add_option("--model", serve.model, "Model directory")->required();
  serve_command->add_option("--threads", serve.threads, "CPU threads of the engine; 0: all")
      ->check(CLI::NonNegativeNumber);
  serve_command->add_option("--tokens", serve.tokens, "Tokens of one measurement")->check(CLI::Range(2, 100000));
  serve_command->add_option("--repeats", serve.repeats, "Pairs of measurements")->check(CLI::Range(1, 1000));
  serve_command->add_option("--json", serve.json, "Also write the figures to this file");

  dejavu::DecodeBenchOptions decode;
  CLI::App* decode_command =
      app.add_subcommand("decode", "Time of a decode step by tier and batch, and the share of the MLP that it reads");
  decode_command->add_option("--model", decode.model, "Model directory")->required();
  decode_command->add_option("--text", decode.text, "Text that is decoded: sparsity depends on it")->required();
  decode_command->add_option("--predictor", decode.predictor, "Predictor file; default: the one in the directory");
  decode_command->add_option("--batch", decode.batches, "Sequences side by side, such as 1,8")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024));
  decode_command->add_option("--tier", decode.tiers, "Such as exact,balanced; DENSE always runs beside them")
      ->delimiter(',')
      ->check(CLI::IsMember({"dense", "exact", "high", "balanced", "fast"}));
  decode_command->add_option("--context", decode.context, "Tokens before the first decoded one")
      ->check(CLI::Range(1, 1 << 20));
  decode_command->add_option("--steps", decode.steps, "Decode steps of one measurement")->check(CLI::Range(1, 1 << 20));
  decode_command->add_option("--repeats", decode.repeats, "Measurements of each tier")->check(CLI::Range(1, 1000));
  decode_command->add_option("--threads", decode.threads, "CPU threads; 0: all")->check(CLI::NonNegativeNumber);
  decode_command->add_option("--json", decode.json, "Also write the figures to this file");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (bandwidth_command->parsed()) return dejavu::RunBandwidthBench(bandwidth);
  return decode_command->parsed() ? dejavu::RunDecodeBench(decode) : dejavu::RunServeBench(serve);
}
