// dejavu-calibrate: makes the predictor of a model.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/calibration/calibrator.h"
#include "engine/calibration/report.h"
#include "engine/eval/tool.h"
#include "engine/model/predictor_file.h"
#include "kernels/base/clock.h"
#include "kernels/base/end_output.h"
#include "kernels/base/exhaustion.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr char kFooter[] =
    "The predictor is bound to the weights by a hash. dejavud, dejavu-eval take it with --predictor FILE, or by "
    "itself\n"
    "where it lies in the model's directory as predictor.safetensors. The table at the end is measured on the last\n"
    "quarter of the text, to which nothing was fitted; dejavu-eval measures on any other text.\n"
    "\n"
    "Interrupted with Ctrl-C it keeps the finished layers in OUT.state and goes on from there when started again with\n"
    "the same settings.\n"
    "\n"
    "Exit codes: 0 done; 1 failed, with the reason on stderr; 2 wrong usage; 130 interrupted.\n"
    "\n"
    "  dejavu-calibrate --model DIR --text books.txt --out DIR/predictor.safetensors";

struct Arguments {
  CalibrationOptions options;
  std::string text, out, json;
  std::vector<double> targets;
  int64_t max_text_tokens = 0;
  bool no_training = false, no_heads = false;
};

uint64_t Fingerprint(const std::vector<int32_t>& tokens) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const int32_t id : tokens) hash = (hash ^ static_cast<uint32_t>(id)) * 1099511628211u;
  return hash;
}

absl::Status Run(Arguments* arguments) {
  const SteadyTime start = std::chrono::steady_clock::now();
  CalibrationOptions& options = arguments->options;
  RETURN_IF_ERROR(CheckWritable(arguments->out));
  RETURN_IF_ERROR(CheckWritable(arguments->json));
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, ReadTokens(options.model, arguments->text, 0));
  options.train = !arguments->no_training;
  options.heads = !arguments->no_heads;
  options.state_file = arguments->out + ".state";
  options.text_fingerprint = Fingerprint(tokens);
  if (!arguments->targets.empty()) options.kl_targets = arguments->targets;
  ASSIGN_OR_RETURN(const OptConfig config, OptConfig::Load(options.model));
  absl::StatusOr<PredictorData> data = absl::UnknownError("");
  {
    ProgressLine line("dejavu-calibrate");
    data = Calibrate(options, tokens, [&](const CalibrationStep& step) {
      line.Show(step.name, step.done);
      return !Interrupted();
    });
  }
  RETURN_IF_ERROR(data.status());
  RETURN_IF_ERROR(WritePredictor(*data, config, arguments->out));
  std::remove(options.state_file.c_str());
  std::fputs(CalibrationTable(*data).c_str(), stdout);
  if (!arguments->json.empty()) RETURN_IF_ERROR(WriteText(arguments->json, data->report_json + "\n"));
  const double seconds = SecondsSince(start);
  std::fputs(absl::StrFormat("%s written in %d:%02d\n", arguments->out, static_cast<int>(seconds) / 60,
                             static_cast<int>(seconds) % 60)
                 .c_str(),
             stdout);
  return absl::OkStatus();
}

void AddOptions(CLI::App* app, Arguments* arguments) {
  CalibrationOptions& o = arguments->options;
  app->add_option("--model", o.model, "Directory of the checkpoint, in Hugging Face layout")->required();
  app->add_option("--text", arguments->text, "UTF-8 text like that which will be served; a few hundred kB are enough")
      ->required();
  app->add_option("--out", arguments->out, "The file to write")->required();
  app->add_option("--json", arguments->json, "Write the report there too, as JSON");
  const std::map<std::string, FitMethod> methods = {
      {"svd", FitMethod::kSvd}, {"whitened-svd", FitMethod::kWhitenedSvd}, {"regression", FitMethod::kRegression}};
  app->add_option("--method", o.method, "Where the predictor starts from: svd (weights only), whitened-svd, regression")
      ->transform(CLI::Transformer(methods))
      ->option_text("NAME [regression]");
  const std::map<std::string, Tap> taps = {
      {"attention-norm", Tap::kAttentionNorm}, {"mlp-norm", Tap::kMlpNorm}, {"previous-layer", Tap::kPreviousLayer}};
  app->add_option(
         "--tap", o.tap,
         "What it reads: attention-norm (rides in the QKV product), mlp-norm (more exact, one more product) or "
         "previous-layer (a layer ahead)")
      ->transform(CLI::Transformer(taps))
      ->option_text("NAME [attention-norm]");
  app->add_flag("--no-training", arguments->no_training, "Leave out the fine-tuning by gradient descent");
  app->add_flag("--no-heads", arguments->no_heads, "Never skip attention heads");
  app->add_option("--kl", arguments->targets,
                  "Mean KL from DENSE, in nats per token, that HIGH, BALANCED and FAST may cost [0.0018,0.0065,0.018]")
      ->delimiter(',')
      ->expected(3)
      ->check(CLI::Range(1e-6, 10.0));
  app->add_option("--tokens", o.tokens, "Tokens to fit to [49152, wide models 16384]")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 32));
  app->add_option("--window", o.window, "Tokens of context [256, or the model's context if that is less]")
      ->check(CLI::Range(2, 1 << 16));
  app->add_option("--memory-mib", o.memory_mib, "Memory to use beside the weights and one step's activations [1536]")
      ->check(CLI::Range(int64_t{16}, int64_t{1} << 24));
  app->add_option("--threads", o.threads, "CPU threads [one per CPU]")->check(CLI::Range(0, 1024));
}

int Main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("Calibrate the predictor that lets dejavud skip neurons and heads of a model.", "dejavu-calibrate");
  app.footer(kFooter);
  app.set_version_flag("--version", "dejavu-calibrate " DEJAVU_VERSION);
  AddOptions(&app, &arguments);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitDone : kExitUsage;
  }
  LogToStderr("dejavu-calibrate", /*warnings=*/true);
  StopOnInterrupt();
  ExitOnExhaustion("dejavu-calibrate", kExitFailed);
  const absl::Status status = Run(&arguments);
  if (status.ok()) return kExitDone;
  if (Interrupted()) {
    std::fputs("dejavu-calibrate: interrupted\n", stderr);
    return kExitInterrupted;
  }
  std::fputs(absl::StrCat("dejavu-calibrate: ", status.message(), "\n").c_str(), stderr);
  return kExitFailed;
}

}  // namespace
}  // namespace dejavu

int main(int argc, char** argv) { return dejavu::EndOutput("dejavu-calibrate", dejavu::Main(argc, argv)); }
