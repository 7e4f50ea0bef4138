// `dejavu-bench checkpoint`: a synthetic model on disk, for peers and for measuring how a model loads.
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/load/checkpoint_writer.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "tests/bench/flags.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

struct CheckpointOptions {
  std::string model;
  std::string weights = "stored";  // stored, fp32, fp16 or bf16
  std::string out;
};

absl::Status Write(const CheckpointOptions& options) {
  StopOnInterrupt();
  if (!IsSynthetic(options.model)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--model ", options.model, ": only synthetic models are written, such as synthetic:opt-1.3b"));
  }
  ProgressLine progress("dejavu-bench");
  return WriteCheckpoint(options.model, options.weights, options.out, ShowProgress(progress, "writing"));
}

}  // namespace

Subcommand AddCheckpoint(CLI::App& program) {
  const auto options = std::make_shared<CheckpointOptions>();
  CLI::App* const command =
      program.add_subcommand("checkpoint", "Writes a synthetic model to disk, in Hugging Face layout");
  command->add_option("--model", options->model, "Such as synthetic:opt-1.3b")->required();
  AddType(command, options->weights, "Type of the matrices", {"bf16", "fp16", "fp32", "stored"});
  command->add_option("--out", options->out, "Directory")->required();
  return {command, [options] { return ExitCode(Write(*options)); }};
}

}  // namespace dejavu
