// FuzzTarget: what reads hostile bytes, with what must hold whatever they are. Its body runs in two programs:
// libFuzzer's (fuzz_main.cc, one program for each target, preset `fuzz`) and the ordinary test fuzz_regressions. One
// thread.
#ifndef TESTS_FUZZ_TARGET_H_
#define TESTS_FUZZ_TARGET_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/base/check.h"
#include "tests/scratch_directory.h"

namespace dejavu {

struct FuzzTarget {
  std::string name;
  size_t max_bytes;  // of an input
  // Ends the process by CHECK, or by a sanitizer, where something does not hold.
  void (*run)(absl::string_view input);
  std::vector<std::string> seeds;  // inputs that lead far in
  std::vector<std::string> words;  // what mutations put in
};

FuzzTarget CertificatesTarget();
FuzzTarget CommandLineTarget();
FuzzTarget CostModelTarget();
FuzzTarget KserveRequestTarget();
FuzzTarget ModelConfigTarget();
FuzzTarget PickleTarget();
FuzzTarget PredictorTarget();
FuzzTarget RequestTarget();
FuzzTarget SafetensorsTarget();
FuzzTarget SchedulerTarget();
FuzzTarget StopMatcherTarget();
FuzzTarget TokenizerTarget();
FuzzTarget TokenizerJsonTarget();
FuzzTarget TokensTarget();
FuzzTarget TraceparentTarget();
FuzzTarget VllmRequestTarget();
FuzzTarget VocabMergesTarget();
FuzzTarget YamlTarget();
FuzzTarget ZipTarget();

// A literal with the zeros that it has.
template <size_t N>
std::string Raw(const char (&literal)[N]) {
  return std::string(literal, N - 1);
}

// Takes an input apart: numbers from its front, the rest as text. Behind the end everything is 0.
class FuzzInput {
 public:
  explicit FuzzInput(absl::string_view bytes) : rest_(bytes) {}

  bool empty() const { return rest_.empty(); }
  uint8_t Byte() {
    if (rest_.empty()) return 0;
    const auto byte = static_cast<uint8_t>(rest_[0]);
    rest_.remove_prefix(1);
    return byte;
  }
  uint64_t Number(int bytes) {
    uint64_t number = 0;
    for (int i = 0; i < bytes; ++i) number = number << 8 | Byte();
    return number;
  }
  // 0 ... count - 1, of as many bytes as that needs.
  uint32_t Below(uint32_t count) {
    return static_cast<uint32_t>(Number(count <= 1 ? 0 : count <= 1 << 8 ? 1 : count <= 1 << 16 ? 2 : 4) % count);
  }
  absl::string_view Take(size_t bytes) {
    const absl::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(taken.size());
    return taken;
  }
  absl::string_view Rest() { return Take(rest_.size()); }
  // Up to the next kSeparator, which no text format has, or to the end.
  static constexpr char kSeparator = '\x1e';
  absl::string_view Section() {
    const absl::string_view section = Take(rest_.find(kSeparator));
    Byte();
    return section;
  }

 private:
  absl::string_view rest_;
};

// The files of a target that reads files: written anew for each input, and only where they have changed.
class FuzzFiles {
 public:
  std::string Write(const std::string& name, absl::string_view bytes) const {
    return directory_.Write(name, std::string(bytes));
  }
  void Remove(const std::string& name) const { std::filesystem::remove(directory_.Path(name)); }
  const std::string& path() const { return directory_.path(); }

 private:
  const ScratchDirectory directory_;
};

// What a reader may answer: OK, or one of `codes` with a message that a log can take, of at most `max_bytes`.
inline constexpr size_t kMaxMessageBytes = 2'000;
void CheckAnswer(const absl::Status& status, const std::vector<absl::StatusCode>& codes,
                 size_t max_bytes = kMaxMessageBytes);

}  // namespace dejavu

#endif  // TESTS_FUZZ_TARGET_H_
