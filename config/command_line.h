// The daemon's command line. Read once, at start, by one thread.
#ifndef CONFIG_COMMAND_LINE_H_
#define CONFIG_COMMAND_LINE_H_

#include <optional>

#include "config/config.h"
#include "engine/plan_options.h"

namespace dejavu {

struct ParsedCommandLine {
  std::optional<int> exit_code;  // set: everything was said; exit with it (0 done, 1 configuration, 2 usage)
  Config config;
  std::optional<PlanOptions> plan;  // set: nothing is to be served, only calculated (--plan)
  bool describe_build = false;  // nothing is to be served: what this build knows of the machine (--version --verbose)
};

// With the process's environment. Prints help, version and errors itself.
ParsedCommandLine ParseCommandLine(int argc, const char* const* argv);

}  // namespace dejavu

#endif  // CONFIG_COMMAND_LINE_H_
