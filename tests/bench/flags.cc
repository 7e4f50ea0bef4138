#include "tests/bench/flags.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/target.h"

namespace dejavu {

ModelRunner::Options RunnerOptions(const ModelFlags& flags) {
  ModelRunner::Options options;
  options.model = flags.model;
  options.weights = flags.weights;
  options.device = flags.device;
  options.threads = flags.threads;
  options.pin = true;
  return options;
}

EngineOptions EngineOptionsOf(const ModelFlags& flags) {
  EngineOptions options;
  options.model = flags.model;
  options.weights = flags.weights;
  options.device = flags.device;
  options.threads = flags.threads;
  return options;
}

void AddThreads(CLI::App* command, int& threads) {
  command->add_option("--threads", threads, "CPU threads; 0: all")->check(CLI::Range(0, 1024));
  command->add_option_function<std::string>(
      "--cpu-target",
      [](const std::string& name) {
        const absl::Status limited = cpu::LimitTarget(name);
        if (!limited.ok()) throw CLI::ValidationError("--cpu-target", std::string(limited.message()));
      },
      "Instruction set of the CPU's kernels, such as avx2; default: the best that the processor has");
}

void AddRepeats(CLI::App* command, int& repeats) {
  command->add_option("--repeats", repeats, "Measurements of everything; figures are their medians")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
}

void AddJson(CLI::App* command, std::string& path) {
  command->add_option("--json", path, "Also write the figures to this file");
}

void AddDevice(CLI::App* command, std::string& device) {
  command->add_option("--device", device, "What computes: cpu, or cuda, the first GPU")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
}

void AddModel(CLI::App* command, ModelFlags& flags) {
  AddModelName(command, flags.model, "synthetic:opt-1.3b");
  AddType(command, flags.weights, "Type of the matrices in memory", kTypesInMemory);
  AddDevice(command, flags.device);
}

void AddModelName(CLI::App* command, std::string& model, const char* example) {
  command->add_option("--model", model, absl::StrCat("Model directory, or a synthetic model such as ", example))
      ->required();
}

void AddType(CLI::App* command, std::string& type, const char* description, const std::vector<std::string>& types) {
  command->add_option("--dtype", type, description)->check(CLI::IsMember(types))->capture_default_str();
}

void AddRankCount(CLI::App* command, int& ranks) {
  command->add_option("--ranks", ranks, "Threads; mpirun says how many there are")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
}

void AddPredictor(CLI::App* command, std::string& predictor) {
  command->add_option("--predictor", predictor, "Predictor file, or none; default: the model's own");
}

void AddSteps(CLI::App* command, int& steps) {
  command->add_option("--steps", steps, "Decode steps of one measurement; 0: as many as take half a second")
      ->check(CLI::Range(0, 1 << 20));
}

CLI::Option* AddBatches(CLI::App* command, std::vector<int>& batches) {
  return command->add_option("--batch", batches, "Sequences side by side, such as 1,4")
      ->delimiter(',')
      ->check(CLI::Range(1, 256));
}

CLI::Option* AddTiers(CLI::App* command, std::vector<std::string>& tiers, const char* description) {
  return command->add_option("--tier", tiers, description)
      ->delimiter(',')
      ->check(CLI::IsMember({"dense", "exact", "high", "balanced", "fast"}));
}

}  // namespace dejavu
