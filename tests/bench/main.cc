// dejavu-bench: what this machine reaches. One subcommand for each question.
#include <string>

#include "CLI/CLI.hpp"
#include "tests/bench/serve.h"

int main(int argc, char** argv) {
  CLI::App app("Measures dejavud on this machine. Figures are medians; compare ratios within one run.", "dejavu-bench");
  app.require_subcommand(1);

  dejavu::ServeBenchOptions serve;
  CLI::App* serve_command = app.add_subcommand(
      "serve", "What the server adds to a token: GenerateStream over loopback against the bare engine");
  serve_command->add_option("--model", serve.model, "Model directory")->required();
  serve_command->add_option("--threads", serve.threads, "CPU threads of the engine; 0: all")
      ->check(CLI::NonNegativeNumber);
  serve_command->add_option("--tokens", serve.tokens, "Tokens of one measurement")->check(CLI::Range(2, 100000));
  serve_command->add_option("--repeats", serve.repeats, "Pairs of measurements")->check(CLI::Range(1, 1000));
  serve_command->add_option("--json", serve.json, "Also write the figures to this file");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  return dejavu::RunServeBench(serve);
}
