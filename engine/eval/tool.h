// What the programs that push a text through a model have in common: reading it, showing progress, stopping on Ctrl-C.
#ifndef ENGINE_EVAL_TOOL_H_
#define ENGINE_EVAL_TOOL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/clock.h"

namespace dejavu {

// Exit codes.
inline constexpr int kExitDone = 0, kExitFailed = 1, kExitUsage = 2, kExitInterrupted = 130;

// What is logged goes to stderr: stdout is for tables alone. `warnings`: and nothing less than those.
void LogToStderr(const char* program, bool warnings);

// From now on the first Ctrl-C (or SIGTERM) only sets Interrupted; a second one ends the program at once.
void StopOnInterrupt();
bool Interrupted();

// The tokens of a UTF-8 file, as of a prompt, at most `max_tokens` of them (0: all). NOT_FOUND where the model's
// directory holds no tokenizer, INVALID_ARGUMENT for text that is not UTF-8 or too short.
absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& model, const std::string& text_file,
                                                int64_t max_tokens);

// Whether a file could be written there, before the work, which may take hours; OK for an empty path.
absl::Status CheckWritable(const std::string& path);
// Written beside `path` and then renamed.
absl::Status WriteText(const std::string& path, const std::string& text);

// Share done and time left on stderr: in place on a terminal, else a line now and then. One thread at a time.
class ProgressLine {
 public:
  explicit ProgressLine(std::string program);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  // `done` in 0 ... 1. Each `part` of the work has its own time left; an empty one is not shown.
  void Show(absl::string_view part, double done);

 private:
  const std::string program_;
  const bool on_terminal_;
  std::string part_;
  SteadyTime part_start_, last_;
  bool shown_ = false;
};

}  // namespace dejavu

#endif  // ENGINE_EVAL_TOOL_H_
