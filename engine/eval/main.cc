// dejavu-eval: quality and cost of the tiers on any text.
#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/eval/evaluation.h"
#include "engine/eval/report.h"
#include "engine/eval/speculation_evaluation.h"
#include "engine/eval/tool.h"
#include "engine/load/loaded_model.h"
#include "engine/ranks/model_runner.h"
#include "kernels/base/end_output.h"
#include "kernels/base/exhaustion.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int32_t kStepRows = 64;

constexpr char kFooter[] =
    "Columns: change, of the perplexity against DENSE. top-1, how often the most likely token is DENSE's. KL, of the\n"
    "next-token distribution from DENSE's. up rows, down rows, MLP: weight rows read, and their mean. recall,\n"
    "precision, missed (share of the output mass): a token's selection against all its non-zero neurons. MLP bytes:\n"
    "read, predictor included, against a dense MLP. bytes/token: all weights that a decoded token reads; ceiling:\n"
    "DENSE's over the tier's. --json has the same by layer, as fractions.\n"
    "\n"
    "Of --speculation, which generates text behind each prompt: right, of the tokens that were drafted. per round, "
    "tokens\n"
    "that a check gave. / off, tokens per second against the same tier without speculation; dejavu-bench decode\n"
    "--speculation repeats that measurement.\n"
    "\n"
    "Exit codes: 0 done; 1 failed, with the reason on stderr; 2 wrong usage; 130 interrupted with Ctrl-C.\n"
    "\n"
    "  dejavu-eval --model deploy/models/opt-8m-books --text book.txt --max-tokens 20000 --json report.json\n"
    "  dejavu-eval --model deploy/models/opt-8m-books --text book.txt --tiers balanced --batch 8 --union\n"
    "  dejavu-eval --model deploy/models/opt-8m-books --text book.txt --speculation --tiers high,fast --draft-tokens "
    "2,4";

struct Arguments {
  std::string model, weights = "stored", kv_dtype = "fp16", predictor, text, json;
  std::vector<std::string> tier_names;
  int64_t max_tokens = 0;
  int32_t batch = 1, window = 0, threads = 0;
  bool union_of_rows = false;
  bool speculation = false;
  std::vector<int> drafts = SpeculationWays().drafts;
  float temperature = 0.0f;
  std::string draft_weights = EngineOptions().draft_weights;
};

// What was asked for; without --tiers all that can be served.
std::vector<Tier> WantedTiers(const Arguments& arguments, const PredictorData* predictor) {
  std::vector<Tier> tiers;
  for (const std::string& name : arguments.tier_names) {
    const Tier tier = *ParseTier(name);
    if (std::find(tiers.begin(), tiers.end(), tier) == tiers.end()) tiers.push_back(tier);
  }
  if (!tiers.empty()) return tiers;
  for (const Tier tier : kAllTiers) {
    const bool served = predictor != nullptr &&
                        std::find(predictor->tiers.begin(), predictor->tiers.end(), tier) != predictor->tiers.end();
    if (!IsPredicted(tier) || served) tiers.push_back(tier);
  }
  return tiers;
}

std::string Heading(const Arguments& arguments, const ModelRunner& runner, const Evaluation& evaluation) {
  const std::string predictor = runner.predictor_path().empty() ? "none" : runner.predictor_path();
  return absl::StrCat("model ", arguments.model, ", ", Name(evaluation.weight_dtype), " weights, predictor ", predictor,
                      "\ntext ", arguments.text, ", ", evaluation.tokens, " tokens scored, window ",
                      runner.options().window, ", batch ", arguments.batch,
                      arguments.union_of_rows ? " (rows compute the union of their selections)"
                                              : " (each row computes its own selection)",
                      "\n\n");
}

int WindowOf(const Arguments& arguments, const OptConfig& config) {
  return arguments.window > 0 ? arguments.window : std::min(256, config.context);
}

// A progress line for `evaluate`, and what it returns.
template <typename Evaluate>
auto WithProgress(const Evaluate& evaluate) {
  ProgressLine line("dejavu-eval");
  return evaluate([&](int64_t done, int64_t total) {
    line.Show("", static_cast<double>(done) / static_cast<double>(total));
    return !Interrupted();
  });
}

EngineOptions EngineOptionsFor(const Arguments& arguments) {
  EngineOptions options;
  options.model = arguments.model;
  options.weights = arguments.weights;
  options.predictor = arguments.predictor;
  options.device = "cpu";
  options.threads = arguments.threads;
  options.kv.dtype = arguments.kv_dtype;
  options.draft_weights = arguments.draft_weights;
  options.scheduler.max_batch = arguments.batch;
  options.scheduler.max_step_tokens = std::max(arguments.batch, options.scheduler.max_step_tokens);
  options.admission.max_waiting_requests = std::max(arguments.batch, options.admission.max_waiting_requests);
  return options;
}

absl::Status RunSpeculation(const Arguments& arguments, const OptConfig& config, absl::Span<const int32_t> tokens) {
  SpeculationEvaluationOptions options;
  for (const std::string& name : arguments.tier_names) options.ways.drafting.push_back(*ParseTier(name));
  options.ways.drafts = arguments.drafts;
  options.window = WindowOf(arguments, config);
  options.batch = arguments.batch;
  options.temperature = arguments.temperature;
  ASSIGN_OR_RETURN(const auto engine,
                   Engine::Create(EngineOptionsFor(arguments), 0, [](int64_t, int64_t) { return !Interrupted(); }));
  const auto evaluation = WithProgress(
      [&](const EvaluationProgress& progress) { return EvaluateSpeculation(*engine, tokens, options, progress); });
  RETURN_IF_ERROR(evaluation.status());
  absl::PrintF(
      "model %s, %s weights, drafts with %s weights\ntext %s, %d windows, %d tokens behind prompts of %d, "
      "batch %d, temperature %g\n\n%s",
      arguments.model, engine->weight_type(), engine->draft_weight_bytes() > 0 ? "int8" : "the same", arguments.text,
      evaluation->windows, evaluation->new_tokens, options.window / 2, arguments.batch, arguments.temperature,
      SpeculationTable(*evaluation));
  return arguments.json.empty() ? absl::OkStatus() : WriteText(arguments.json, SpeculationJson(*evaluation));
}

absl::Status Run(const Arguments& arguments) {
  RETURN_IF_ERROR(CheckWritable(arguments.json));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(arguments.model));
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                   ReadTokens(arguments.model, arguments.text, arguments.max_tokens));
  if (arguments.speculation) return RunSpeculation(arguments, config, tokens);

  ModelRunner::Options options;
  options.model = arguments.model;
  options.weights = arguments.weights;
  options.kv_dtype = arguments.kv_dtype;
  options.predictor = arguments.predictor;
  options.threads = arguments.threads;
  options.slots = arguments.batch;
  options.max_rows = arguments.union_of_rows ? arguments.batch : std::max(arguments.batch, kStepRows);
  options.max_audits = options.max_rows;
  options.window = WindowOf(arguments, config);
  ASSIGN_OR_RETURN(const auto runner, ModelRunner::Create(options, [](int64_t, int64_t) { return !Interrupted(); }));
  const EvaluationOptions wanted = {WantedTiers(arguments, runner->predictor_data()), arguments.union_of_rows};
  const auto evaluation = WithProgress([&](const EvaluationProgress& progress) {
    return Evaluate(*runner, runner->predictor_data(), tokens, wanted, progress);
  });
  RETURN_IF_ERROR(evaluation.status());
  std::fputs(Heading(arguments, *runner, *evaluation).c_str(), stdout);
  std::fputs(EvaluationTable(*evaluation).c_str(), stdout);
  return arguments.json.empty() ? absl::OkStatus() : WriteText(arguments.json, EvaluationJson(*evaluation));
}

std::string CheckTierName(const std::string& name) {
  if (ParseTier(name).has_value()) return "";
  const auto append = [](std::string* out, Tier tier) { absl::StrAppend(out, Name(tier)); };
  return absl::StrCat("'", name, "' is no tier; it must be one of ", absl::StrJoin(kAllTiers, ", ", append));
}

void AddOptions(CLI::App* program, Arguments* arguments) {
  program->add_option("--model", arguments->model, "Model directory in Hugging Face layout, with a tokenizer")
      ->required();
  program->add_option("--text", arguments->text, "UTF-8 text to evaluate on")->required();
  program
      ->add_option("--weights", arguments->weights, "Type of the matrices in memory: stored, fp32, fp16, bf16 or int8")
      ->check(CLI::IsMember({"stored", "fp32", "fp16", "bf16", "int8"}))
      ->capture_default_str();
  program->add_option("--kv-dtype", arguments->kv_dtype, "Type of keys and values in memory: fp16 or fp32")
      ->check(CLI::IsMember({"fp16", "fp32"}))
      ->capture_default_str();
  program->add_option("--predictor", arguments->predictor,
                      "Predictor file, or none; default: predictor.safetensors in the model directory, if there");
  program
      ->add_option("--tiers", arguments->tier_names,
                   "Such as dense,balanced; default: dense, exact and what the predictor serves")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Validator(CheckTierName, "TIER"));
  program->add_option("--max-tokens", arguments->max_tokens, "Take only the first so many tokens of the text; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  program
      ->add_option("--window", arguments->window,
                   "Tokens of a window, which starts without context; default: 256 or the model's context, if smaller")
      ->check(CLI::Range(2, 1 << 20));
  program->add_option("--batch", arguments->batch, "Windows side by side")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  program->add_flag(
      "--union", arguments->union_of_rows,
      "Each step holds one row of each window of the batch, and all compute the union of what they select");
  program->add_flag("--speculation", arguments->speculation,
                    "Instead: how often what --tiers draft is right, and what that gains beside DENSE and EXACT");
  program->add_option("--draft-tokens", arguments->drafts, "Of --speculation: drafted in a round, such as 2,4,6")
      ->delimiter(',')
      ->check(CLI::Range(1, kMostDraftTokens));
  program->add_option("--temperature", arguments->temperature, "Of --speculation; 0: greedy")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  program
      ->add_option("--draft-weights", arguments->draft_weights,
                   "Of --speculation: what tiers draft with: auto, stored or int8")
      ->check(CLI::IsMember({kAutoDrafts, kStoredDrafts, kInt8Drafts}))
      ->capture_default_str();
  program->add_option("--threads", arguments->threads, "CPU threads; 0: one per CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  program->add_option("--json", arguments->json, "Write the figures, by layer too, to this file");
}

int Main(int argc, char** argv) {
  CLI::App program("Quality and cost of the tiers of a model on a text, against DENSE", "dejavu-eval");
  program.set_version_flag("--version", "dejavu-eval " DEJAVU_VERSION);
  program.footer(kFooter);
  Arguments arguments;
  AddOptions(&program, &arguments);
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return program.exit(error) == 0 ? 0 : kExitUsage;  // 0: --help and --version
  }
  if (arguments.union_of_rows && arguments.batch < 2) {
    std::fputs("dejavu-eval: --union needs --batch of 2 or more\n", stderr);
    return kExitUsage;
  }
  if (arguments.union_of_rows && arguments.speculation) {
    std::fputs("dejavu-eval: --union says nothing of --speculation\n", stderr);
    return kExitUsage;
  }
  LogToStderr("dejavu-eval", /*warnings=*/true);
  StopOnInterrupt();
  ExitOnExhaustion("dejavu-eval", kExitFailed);
  const absl::Status status = Run(arguments);
  if (status.ok()) return 0;
  if (absl::IsCancelled(status)) return kExitInterrupted;
  std::fprintf(stderr, "dejavu-eval: %s\n", std::string(status.message()).c_str());
  return kExitFailed;
}

}  // namespace
}  // namespace dejavu

int main(int argc, char** argv) { return dejavu::EndOutput("dejavu-eval", dejavu::Main(argc, argv)); }
