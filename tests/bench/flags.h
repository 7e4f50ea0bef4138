// The flags that subcommands of dejavu-bench share. Defaults are those that the values have when a flag is added; they
// must live until the flags are parsed.
#ifndef TESTS_BENCH_FLAGS_H_
#define TESTS_BENCH_FLAGS_H_

#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "engine/options.h"
#include "engine/ranks/model_runner.h"

namespace dejavu {

// What runs, and on what.
struct ModelFlags {
  std::string model;               // as ModelOptions has it
  std::string weights = "stored";  // likewise
  std::string device = "cpu";      // or cuda
  int threads = 0;                 // 0: one per CPU
};

ModelRunner::Options RunnerOptions(const ModelFlags& flags);  // pinned, without a predictor
EngineOptions EngineOptionsOf(const ModelFlags& flags);

void AddThreads(CLI::App* command, int& threads);
void AddRepeats(CLI::App* command, int& repeats);
void AddJson(CLI::App* command, std::string& path);

// A subcommand that measures: --threads, --repeats, --json.
template <typename Options>
CLI::App* AddMeasuring(CLI::App& program, const char* name, const char* description, Options& options) {
  CLI::App* const command = program.add_subcommand(name, description);
  AddThreads(command, options.threads);
  AddRepeats(command, options.repeats);
  AddJson(command, options.json);
  return command;
}

void AddDevice(CLI::App* command, std::string& device);
// --model, --dtype, --device.
void AddModel(CLI::App* command, ModelFlags& flags);
// The first alone; `example` is the name of a synthetic model.
void AddModelName(CLI::App* command, std::string& model, const char* example);
// `types` as --dtype has them: bf16, fp16, fp32, int8, stored.
void AddType(CLI::App* command, std::string& type, const char* description, const std::vector<std::string>& types);
inline const std::vector<std::string> kTypes = {"bf16", "fp16", "fp32", "int8"};
inline const std::vector<std::string> kTypesInMemory = {"bf16", "fp16", "fp32", "int8", "stored"};

void AddRankCount(CLI::App* command, int& ranks);  // of a group that may also be mpirun's
void AddPredictor(CLI::App* command, std::string& predictor);
void AddSteps(CLI::App* command, int& steps);  // of one measurement
CLI::Option* AddBatches(CLI::App* command, std::vector<int>& batches);
CLI::Option* AddTiers(CLI::App* command, std::vector<std::string>& tiers, const char* description);

}  // namespace dejavu

#endif  // TESTS_BENCH_FLAGS_H_
