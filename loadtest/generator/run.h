// `dejavu-loadtest run`: a server, a warm-up, one run or the steps of a ramp, and what is written of it.
#ifndef LOADTEST_GENERATOR_RUN_H_
#define LOADTEST_GENERATOR_RUN_H_

#include <atomic>
#include <string>

#include "absl/status/status.h"
#include "loadtest/generator/options.h"
#include "nlohmann/json.hpp"

namespace dejavu {

enum LoadtestExit {
  kLoadtestOk = 0,
  kLoadtestFailed = 1,  // something could not be read or written
  kLoadtestUsage = 2,
  kLoadtestUnavailable = 3,
  kLoadtestInvalid = 4,  // measured, but not to be believed
  kLoadtestInterrupted = 130,
};

// What the flags alone say: INVALID_ARGUMENT names the flag.
absl::Status CheckOptions(const RunOptions& options);

// Prints the report on stdout, progress and failures on stderr, and returns the exit code. `interrupted` ends the run;
// what was measured by then is reported as invalid.
int Run(const RunOptions& options, const nlohmann::ordered_json& config, const std::atomic<bool>& interrupted);

absl::Status WriteFile(const std::string& path, const std::string& text);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_RUN_H_
