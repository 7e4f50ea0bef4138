// Every fuzz target over its seeds, its corpus and its kept crashes (tests/fuzz/corpus, tests/fuzz/crashes), and over
// some hundred changes of them, the same ones each time. What goes wrong ends the process: which input it was is said
// on stderr, and its bytes are left in the file FAILED_INPUT of the working directory.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

constexpr char kFailedInput[] = "FAILED_INPUT";
constexpr int kMutations = 300;  // of each target

const std::vector<FuzzTarget>& Targets() {
  static const std::vector<FuzzTarget>& targets = *new std::vector<FuzzTarget>{
      CertificatesTarget(),  CommandLineTarget(), CostModelTarget(),   KserveRequestTarget(),
      ModelConfigTarget(),   PickleTarget(),      PredictorTarget(),   RequestTarget(),
      SafetensorsTarget(),   SchedulerTarget(),   StopMatcherTarget(), TokenizerTarget(),
      TokenizerJsonTarget(), TokensTarget(),      TraceparentTarget(), VllmRequestTarget(),
      VocabMergesTarget(),   YamlTarget(),        ZipTarget()};
  return targets;
}

// What runs now, for the handler of signals.
const std::string* running_name = nullptr;
const std::string* running_input = nullptr;

void Put(int fd, const char* text, size_t bytes) {
  if (write(fd, text, bytes) < 0) _exit(1);
}

void OnSignal(int signal) {
  if (running_name != nullptr) {
    Put(2, running_name->data(), running_name->size());
    Put(2, "\n", 1);
    if (const int fd = open(kFailedInput, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644); fd >= 0) {
      Put(fd, running_input->data(), running_input->size());
    }
  }
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

class FuzzRegressions : public testing::TestWithParam<FuzzTarget> {
 protected:
  static void SetUpTestSuite() {
    for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) std::signal(signal, OnSignal);
  }
  static void TearDownTestSuite() {
    for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) std::signal(signal, SIG_DFL);
  }

  static void Run(const std::string& what, const std::string& input) {
    const std::string name = "the input that failed is " + what + " of the fuzz target " + GetParam().name +
                             "; its bytes are in " + kFailedInput;
    running_name = &name;
    running_input = &input;
    GetParam().run(input);
    running_name = nullptr;
  }

  // The files of that folder of the target, by name.
  static std::vector<std::filesystem::path> Files(const std::string& folder) {
    std::vector<std::filesystem::path> files;
    const std::string directory = std::string(FUZZ_INPUTS "/") + folder + "/" + GetParam().name;
    std::error_code none;
    for (const auto& entry : std::filesystem::directory_iterator(directory, none)) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    return files;
  }
  static std::string Read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  }
};

// Small changes, several at once: bits, bytes, numbers, the target's words, pieces of other inputs.
class Mutator {
 public:
  Mutator(const FuzzTarget& target, const std::vector<std::string>& inputs)
      : target_(target), inputs_(inputs), random_(0xDE1A) {}

  std::string Next() {
    std::string input = inputs_[Below(inputs_.size())];
    for (size_t i = 0, changes = 1 + Below(4); i < changes; ++i) Change(&input);
    input.resize(std::min(input.size(), target_.max_bytes));
    return input;
  }

 private:
  // Not a distribution: these differ between libraries.
  size_t Below(size_t count) { return count == 0 ? 0 : random_() % count; }

  void Change(std::string* input) {
    const size_t at = Below(input->size() + 1);
    switch (Below(7)) {
      case 0:
        if (at < input->size()) (*input)[at] = static_cast<char>((*input)[at] ^ (1 << Below(8)));
        break;
      case 1:
        if (at < input->size()) (*input)[at] = static_cast<char>(Below(256));
        break;
      case 2:
        input->insert(at, std::string(1 + Below(4), static_cast<char>(Below(256))));
        break;
      case 3:
        input->erase(at, 1 + Below(16));
        break;
      case 4:
        if (!target_.words.empty()) input->insert(at, target_.words[Below(target_.words.size())]);
        break;
      case 5: {
        const std::string& other = inputs_[Below(inputs_.size())];
        input->insert(at, other, Below(other.size() + 1), 1 + Below(64));
        break;
      }
      default:
        input->insert(at, *input, Below(input->size() + 1), 1 + Below(64));
    }
  }

  const FuzzTarget& target_;
  const std::vector<std::string>& inputs_;
  std::mt19937_64 random_;
};

TEST_P(FuzzRegressions, HoldsOverSeedsCorpusCrashesAndTheirChanges) {
  std::vector<std::string> inputs = {""};
  Run("the empty one", inputs[0]);
  for (const std::string& seed : GetParam().seeds) {
    Run("seed " + std::to_string(inputs.size() - 1), seed);
    inputs.push_back(seed);
  }
  for (const char* folder : {"corpus", "crashes"}) {
    for (const std::filesystem::path& path : Files(folder)) {
      inputs.push_back(Read(path));
      Run(path.string(), inputs.back());
    }
  }
  Mutator mutator(GetParam(), inputs);
  for (int i = 0; i < kMutations; ++i) Run("change " + std::to_string(i), mutator.Next());
}

INSTANTIATE_TEST_SUITE_P(Targets, FuzzRegressions, testing::ValuesIn(Targets()),
                         [](const testing::TestParamInfo<FuzzTarget>& info) { return info.param.name; });

// A folder that no target reads would be a test that nobody runs.
TEST(FuzzInputs, BelongToATarget) {
  for (const char* folder : {"corpus", "crashes"}) {
    std::error_code none;
    for (const auto& entry : std::filesystem::directory_iterator(std::string(FUZZ_INPUTS "/") + folder, none)) {
      const std::string name = entry.path().filename();
      EXPECT_TRUE(std::any_of(Targets().begin(), Targets().end(), [&](const FuzzTarget& t) { return t.name == name; }))
          << entry.path();
    }
  }
}

}  // namespace
}  // namespace dejavu
