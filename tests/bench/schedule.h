// What the scheduler costs and what it keeps: its own time for a step, the gaps between tokens while long prompts
// arrive, and what a known prefix saves.
#ifndef TESTS_BENCH_SCHEDULE_H_
#define TESTS_BENCH_SCHEDULE_H_

#include <string>

namespace dejavu {

struct ScheduleBenchOptions {
  std::string model;
  std::string weights = "stored";  // as ModelOptions has it
  std::string device = "cpu";      // or cuda
  int threads = 0;
  int repeats = 5;
  int prompt_tokens = 450;
  double seconds = 5.0;  // of each measurement of gaps
  std::string json;
};

// Prints tables; returns the process's exit code.
int RunScheduleBench(const ScheduleBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_SCHEDULE_H_
