// dejavu-bench: what this machine reaches. One subcommand for each question.
#include <cstdio>
#include <exception>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "engine/eval/tool.h"
#include "kernels/base/end_output.h"
#include "kernels/base/exhaustion.h"
#include "tests/bench/subcommand.h"

namespace {

int Main(int argc, char** argv) {
  dejavu::ExitOnExhaustion("dejavu-bench", 1);
  dejavu::LogToStderr("dejavu-bench", /*warnings=*/false);
  CLI::App program("Measures dejavud on this machine. Figures are medians; compare ratios within one run.",
                   "dejavu-bench");
  program.require_subcommand(1);
  std::vector<dejavu::Subcommand> subcommands;
  for (dejavu::AddSubcommand* const add : dejavu::kSubcommands) subcommands.push_back(add(program));
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return program.exit(error) == 0 ? 0 : 2;
  }
  try {
    for (const dejavu::Subcommand& subcommand : subcommands) {
      if (subcommand.flags->parsed()) return subcommand.run();
    }
  } catch (const std::exception& error) {  // the device failed
    std::fprintf(stderr, "dejavu-bench: %s\n", error.what());
  }
  return 1;
}

}  // namespace

int main(int argc, char** argv) { return dejavu::EndOutput("dejavu-bench", Main(argc, argv)); }
