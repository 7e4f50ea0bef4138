#include "tests/bench/checkpoint.h"

#include "absl/strings/str_cat.h"
#include "engine/eval/tool.h"
#include "engine/load/checkpoint_writer.h"
#include "engine/load/synthetic.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

absl::Status Write(const CheckpointOptions& options) {
  StopOnInterrupt();
  if (!IsSynthetic(options.model)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--model ", options.model, ": only synthetic models are written, such as synthetic:opt-1.3b"));
  }
  ProgressLine progress("dejavu-bench");
  return WriteCheckpoint(options.model, options.weights, options.out, [&](int64_t done_bytes, int64_t total_bytes) {
    progress.Show("writing", static_cast<double>(done_bytes) / static_cast<double>(total_bytes));
    return !Interrupted();
  });
}

}  // namespace

int RunCheckpoint(const CheckpointOptions& options) { return ExitCode(Write(options)); }

}  // namespace dejavu
