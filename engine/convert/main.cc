// dejavu-convert: a model's weights as they lie in memory, written once.
#include <cstdio>
#include <string>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/strings/str_format.h"
#include "engine/convert/converter.h"
#include "engine/eval/tool.h"
#include "kernels/base/end_output.h"
#include "kernels/base/exhaustion.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr char kFooter[] =
    "The directory is a model like any other for dejavud and its tools: --model names it, and nothing is converted "
    "when it\n"
    "is loaded. On the CPU one rank computes with the mapped file itself. The weights' memory is taken while it is "
    "written.\n"
    "Replace the directory with --force or by renaming; a file that a daemon has mapped must not be written to.\n"
    "\n"
    "Exit codes: 0 done; 1 failed, with the reason on stderr; 2 wrong usage; 130 interrupted with Ctrl-C.\n"
    "\n"
    "  dejavu-convert --model opt-13b --weights int8 --out opt-13b-int8\n"
    "  dejavud --model opt-13b-int8";

absl::Status Run(const ConvertOptions& options) {
  absl::StatusOr<Converted> converted;
  {
    ProgressLine line("dejavu-convert");
    converted = ConvertModel(options, [&](absl::string_view part, int64_t done, int64_t total) {
      line.Show(part, static_cast<double>(done) / static_cast<double>(total));
      return !Interrupted();
    });
  }
  RETURN_IF_ERROR(converted.status());
  absl::PrintF("%s: %.2f GB of %s weights\n", options.out, static_cast<double>(converted->bytes) / 1e9,
               converted->weights);
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  CLI::App program("Writes a model's weights as they lie in memory, so that it starts without a second pass over them",
                   "dejavu-convert");
  program.set_version_flag("--version", "dejavu-convert " DEJAVU_VERSION);
  program.footer(kFooter);
  ConvertOptions options;
  program.add_option("--model", options.model, "Model directory in Hugging Face layout")->required();
  program.add_option("--weights", options.weights, "Type of the matrices: stored, fp32, fp16, bf16 or int8")
      ->check(CLI::IsMember({"stored", "fp32", "fp16", "bf16", "int8"}))
      ->capture_default_str();
  program.add_option("--out", options.out, "Directory to make")->required();
  program.add_flag("--force", options.force, "Replace the directory if it holds a converted model");
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return program.exit(error) == 0 ? 0 : kExitUsage;  // 0: --help and --version
  }
  LogToStderr("dejavu-convert", /*warnings=*/true);
  StopOnInterrupt();
  ExitOnExhaustion("dejavu-convert", kExitFailed);
  const absl::Status status = OrExhausted([&] { return Run(options); });
  if (status.ok()) return kExitDone;
  if (absl::IsCancelled(status)) return kExitInterrupted;
  absl::FPrintF(stderr, "dejavu-convert: %s\n", status.message());
  return kExitFailed;
}

}  // namespace
}  // namespace dejavu

int main(int argc, char** argv) { return dejavu::EndOutput("dejavu-convert", dejavu::Main(argc, argv)); }
