// dejavu-cli: a client for people and scripts.
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/status/status.h"
#include "kernels/base/end_output.h"
#include "loadtest/cli/commands.h"
#include "loadtest/cli/output.h"

namespace {

constexpr char kFooter[] =
    "Exit codes: 0 done; 1 the request failed, or the answer is no (health, abort); 2 wrong usage; 3 the server cannot "
    "be\n"
    "reached or takes no requests; 4 the time was over; 130 interrupted. A failure is explained on stderr; with "
    "--json,\n"
    "stdout also gets {\"error\": {\"code\", \"message\", \"details\"}}.\n"
    "\n"
    "  dejavu-cli generate \"It was a dark night, and\" --max-new-tokens 60 --temperature 0.7 --seed 7 --stats\n"
    "  dejavu-cli score --prompt-file chapter.txt --top-logprobs 5 --json";

int ExitCodeOf(const CLI::App& program, const CLI::ParseError& error) {
  return program.exit(error) == 0 ? dejavu::kExitOk : dejavu::kExitUsage;  // 0: --help and --version
}

void AddConnectionFlags(CLI::App* program, dejavu::ConnectionOptions* options) {
  program->add_option("--server", options->server, "HOST:PORT of the server")
      ->envname("DEJAVU_SERVER")
      ->capture_default_str();
  program->add_option("--admin-server", options->admin_server, "HOST:PORT of its admin.listen, for the command admin")
      ->envname("DEJAVU_ADMIN_SERVER")
      ->capture_default_str();
  program->add_option("--timeout", options->timeout_s, "Seconds that the command may take; 0: no limit")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  program
      ->add_option("--wait", options->wait_s, "Seconds to wait for a server that is still loading its model; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  dejavu::AddChannelFlags(program, &options->channel);
}

int Usage(const absl::Status& status) {
  std::fprintf(stderr, "dejavu-cli: %s\n", std::string(status.message()).c_str());
  return dejavu::kExitUsage;
}

int Run(dejavu::Command* command, const dejavu::ConnectionOptions& options) {
  const absl::Status ready = command->Prepare();
  if (!ready.ok()) return Usage(ready);
  const absl::StatusOr<std::unique_ptr<dejavu::Connection>> connection = dejavu::Connection::Open(options);
  if (!connection.ok()) return Usage(connection.status());
  return command->Run(connection->get());
}

int Main(int argc, char** argv) {
  CLI::App program("Client of dejavud", "dejavu-cli");
  program.set_version_flag("--version", "dejavu-cli " DEJAVU_VERSION);
  program.require_subcommand(1);
  program.fallthrough();
  program.footer(kFooter);

  dejavu::ConnectionOptions options;
  AddConnectionFlags(&program, &options);

  std::vector<std::unique_ptr<dejavu::Command>> commands = dejavu::MakeOtherCommands(&program);
  commands.push_back(dejavu::MakeGenerateCommand(&program));
  commands.push_back(dejavu::MakeCompareCommand(&program));
  commands.push_back(dejavu::MakeAdminCommand(&program));
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return ExitCodeOf(program, error);
  }
  for (const auto& command : commands) {
    if (command->app()->parsed()) return Run(command.get(), options);
  }
  return dejavu::kExitUsage;
}

}  // namespace

int main(int argc, char** argv) { return dejavu::EndOutput("dejavu-cli", Main(argc, argv)); }
