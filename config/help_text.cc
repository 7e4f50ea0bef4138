#include "config/help_text.h"

#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "config/config.h"
#include "config/option_table.h"
#include "config/plan_flags.h"
#include "engine/plan_options.h"

namespace dejavu {
namespace {

// What --help shows after the flag: what its value is, or for a switch the way to turn it off.
std::string Placeholder(const Option& option) {
  if (option.is_bool()) return absl::StrCat(", --no-", FlagName(option.key).substr(2));
  if (!option.choices.empty()) return " " + absl::StrJoin(option.choices, "|");
  if (!option.is_text()) return " N";
  if (option.key == "model") return " DIR";
  if (option.key == "predictor") return " FILE";
  if (option.key == "listen") return " HOST:PORT";
  return absl::EndsWith(option.key, "_file") ? " FILE" : " TEXT";
}

// Every option below the heading of its group.
std::string OptionsText() {
  Config defaults;
  std::string text;
  std::string group;
  for (const Option& option : OptionTable(&defaults)) {
    if (option.group != group) absl::StrAppend(&text, "\n", option.group, ":\n");
    group = option.group;
    std::vector<std::string> notes;
    if (!option.is_text()) notes.push_back(LimitText(option));
    if (!OptionText(option).empty()) notes.push_back(absl::StrCat("default ", OptionText(option)));
    absl::StrAppend(&text, "  ", FlagName(option.key), Placeholder(option), "\n      ", option.help,
                    notes.empty() ? "" : absl::StrCat(" (", absl::StrJoin(notes, "; "), ")"), " [",
                    EnvironmentName(option.key), "]\n");
  }
  return text;
}

std::string PlanningText() {
  const PlanOptions plan;
  return absl::StrCat(
      "\nPlanning (with --plan; the model, its types and its memory are said by the flags above):\n",
      "  --plan-device ", absl::StrJoin(DeviceKindNames(), "|"), "\n      kind of device\n",
      "  --plan-devices N\n      how many; each is a rank (1 to ", kMaxPlanDevices, "; default ", plan.devices, ")\n",
      "  --plan-memory-gib N\n      memory of each (default: the kind's)\n",
      "  --plan-bandwidth-gbs N\n      read bandwidth of each in GB/s (default: the kind's data sheet)\n",
      "  --plan-bandwidth-share N\n      share of it that a decode step reaches (above 0 to 1; default ",
      plan.bandwidth_share, ")\n", "  --plan-all-reduce-us N\n      time of one all-reduce (default: the kind's)\n",
      "  --plan-context N\n      tokens of each sequence where latencies are estimated (default ", plan.context_tokens,
      ")\n");
}

}  // namespace

std::string HelpText() {
  std::string text =
      "dejavud serves an OPT model over gRPC.\n\n"
      "  dejavud --model DIR [flags]\n\n"
      "Every flag is also an environment variable (in brackets) and a key of the YAML file: --kv-block-tokens is\n"
      "block_tokens below kv. A flag wins over the environment, which wins over the file, which wins over the "
      "default.\n\n"
      "  --config FILE       YAML file to read [DEJAVUD_CONFIG]\n"
      "  --check-config      check flags, environment and file; exit 0 if they are good, 1 if not\n"
      "  --print-config      write the configuration in effect as YAML and exit\n"
      "  --plan[=json]       calculate memory and latencies on devices that need not be there (see Planning) and "
      "exit;\n"
      "                      0 if the model fits, 1 if not\n"
      "  --version           write the version and exit; with --verbose also the CPU kernels that are used here, and "
      "why\n"
      "  --help              write this and exit\n";
  absl::StrAppend(&text, OptionsText(), PlanningText());
  absl::StrAppend(
      &text,
      "\nExit codes: 0 drained after SIGTERM or SIGINT; 1 cannot start (configuration, model, port); 2 wrong usage;\n"
      "3 the engine failed; 4 a second signal cut off running requests.\n");
  return text;
}

}  // namespace dejavu
