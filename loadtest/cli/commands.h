// The commands of dejavu-cli. Each adds its flags to the program and runs later, from the main thread; what Run returns
// is the exit code.
#ifndef LOADTEST_CLI_COMMANDS_H_
#define LOADTEST_CLI_COMMANDS_H_

#include <memory>
#include <vector>

#include "CLI/App.hpp"
#include "absl/status/status.h"
#include "loadtest/cli/connection.h"

namespace dejavu {

class Command {
 public:
  explicit Command(CLI::App* app) : app_(app) {}
  virtual ~Command() = default;

  const CLI::App* app() const { return app_; }
  // What must be there before the server is asked, the prompt for example. INVALID_ARGUMENT is a usage error.
  virtual absl::Status Prepare() { return absl::OkStatus(); }
  virtual int Run(Connection* connection) = 0;

 protected:
  void AddJsonFlag() { app_->add_flag("--json", json_, "Write one JSON object"); }

  CLI::App* const app_;
  bool json_ = false;
};

std::unique_ptr<Command> MakeGenerateCommand(CLI::App* program);
std::unique_ptr<Command> MakeCompareCommand(CLI::App* program);
std::unique_ptr<Command> MakeAdminCommand(CLI::App* program);
std::vector<std::unique_ptr<Command>> MakeOtherCommands(CLI::App* program);

}  // namespace dejavu

#endif  // LOADTEST_CLI_COMMANDS_H_
