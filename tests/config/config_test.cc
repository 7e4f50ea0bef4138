#include "config/config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "config/command_line.h"
#include "config/option_table.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

absl::StatusOr<Config> LoadYaml(const std::string& yaml) {
  return LoadConfig({.yaml = yaml, .yaml_name = "t.yaml", .environment = {}, .flags = {}});
}

std::string ErrorOf(const std::string& yaml) {
  const absl::StatusOr<Config> config = LoadYaml(yaml);
  return config.ok() ? "no error" : std::string(config.status().message());
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

ParsedCommandLine Parse(std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "dejavud");
  return ParseCommandLine(static_cast<int>(arguments.size()), arguments.data());
}

struct Outcome {
  int exit_code;
  std::string out, err;
};

Outcome RunAndExit(const std::vector<const char*>& arguments) {
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  const ParsedCommandLine parsed = Parse(arguments);
  std::fflush(stdout);
  Outcome run{parsed.exit_code.value_or(-1), testing::internal::GetCapturedStdout(),
              testing::internal::GetCapturedStderr()};
  return run;
}

std::string WriteTemporary(const std::string& name, const std::string& content) {
  const std::string path = testing::TempDir() + name;
  std::ofstream(path, std::ios::binary) << content;
  return path;
}

TEST(Config, AFlagWinsOverTheEnvironmentWhichWinsOverTheFileWhichWinsOverTheDefault) {
  ConfigSources sources{.yaml = "threads: 1\nkv:\n  block_tokens: 1\nscheduler: {max_batch: 1}",
                        .yaml_name = "t.yaml",
                        .environment = {{"DEJAVUD_THREADS", "2"}, {"DEJAVUD_KV_BLOCK_TOKENS", "2"}},
                        .flags = {{"threads", "3"}}};
  const absl::StatusOr<Config> config = LoadConfig(sources);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->engine.threads, 3);
  EXPECT_EQ(config->engine.kv.block_tokens, 2);
  EXPECT_EQ(config->engine.scheduler.max_batch, 1);
  EXPECT_EQ(config->engine.scheduler.max_step_tokens, EngineOptions().scheduler.max_step_tokens);
}

// A value that differs from the default and keeps to the limits, those of the default values of other keys too.
std::string OtherValue(const Option& option) {
  if (option.is_bool()) return OptionText(option) == "true" ? "false" : "true";
  if (option.key == "sparsity.highest_tier" || option.key == "sparsity.lowest_tier") return "exact";
  if (option.key == "sparsity.min_shadow_every") return "2";
  if (!option.is_text()) {
    const std::string most = absl::StrCat(static_cast<int64_t>(option.limits.most));
    return most == OptionText(option) ? absl::StrCat(static_cast<int64_t>(option.limits.least)) : most;
  }
  if (!option.choices.empty())
    return option.choices.back() == OptionText(option) ? option.choices[0] : option.choices.back();
  return option.check != nullptr ? "[::1]:0" : "say \"hello\" \\ # ünïcode: [1]\n\x01";
}

TEST(Config, EveryKeyCanBeSetFromEverySource) {
  Config defaults;
  for (const Option& option : OptionTable(&defaults)) {
    const std::string value = OtherValue(option);
    const absl::StatusOr<Config> by_flag =
        LoadConfig({.yaml = {}, .yaml_name = {}, .environment = {}, .flags = {{option.key, value}}});
    ASSERT_TRUE(by_flag.ok()) << by_flag.status();
    const absl::StatusOr<Config> by_environment =
        LoadConfig({.yaml = {}, .yaml_name = {}, .environment = {{EnvironmentName(option.key), value}}, .flags = {}});
    ASSERT_TRUE(by_environment.ok()) << by_environment.status();
    const std::string printed = FormatConfig(*by_flag);
    EXPECT_NE(printed, FormatConfig(defaults)) << option.key;
    EXPECT_EQ(printed, FormatConfig(*by_environment)) << option.key;
    const absl::StatusOr<Config> by_file = LoadYaml(printed);
    ASSERT_TRUE(by_file.ok()) << by_file.status();
    EXPECT_EQ(printed, FormatConfig(*by_file)) << option.key;
  }
}

TEST(Config, EveryTargetIsUsedByOneKeyOnly) {
  Config defaults;
  std::set<const void*> targets;
  for (const Option& option : OptionTable(&defaults)) {
    std::visit([&](const auto* target) { EXPECT_TRUE(targets.insert(target).second) << option.key; }, option.target);
  }
}

TEST(Config, TheDefaultsKeepToTheirOwnLimits) {
  Config defaults;
  for (const Option& option : OptionTable(&defaults)) {
    EXPECT_TRUE(SetOption(option, OptionText(option)).ok()) << option.key;
  }
}

TEST(Config, NamesFollowOneRule) {
  EXPECT_EQ(FlagName("kv.block_tokens"), "--kv-block-tokens");
  EXPECT_EQ(EnvironmentName("kv.block_tokens"), "DEJAVUD_KV_BLOCK_TOKENS");
}

// After a change of the table: dejavud --print-config > config/dejavud.yaml, with the opening comment put back.
TEST(Config, TheExampleFileHoldsEveryKeyAtItsDefault) {
  const std::string example = ReadFile(EXAMPLE_CONFIG);
  const absl::StatusOr<Config> config = LoadYaml(example);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(FormatConfig(*config), FormatConfig(Config()));
  EXPECT_THAT(example, testing::EndsWith(FormatConfig(Config())));
}

TEST(Config, AFileMayBeEmptyOrHoldOnlyCommentsOrEmptySections) {
  for (const char* yaml :
       {"", "\n", "# nothing\n", "---\n", "version: 1\n", "kv:\n", "{}", "\xEF\xBB\xBFthreads: 0\n"}) {
    const absl::StatusOr<Config> config = LoadYaml(yaml);
    ASSERT_TRUE(config.ok()) << yaml << config.status();
    EXPECT_EQ(FormatConfig(*config), FormatConfig(Config())) << yaml;
  }
}

TEST(Config, ErrorsInTheFileNamePlaceKeyValueAndLimit) {
  EXPECT_EQ(ErrorOf("kv:\n  block_tokens: 0\n"),
            "t.yaml:2:17: kv.block_tokens is \"0\"; must be a whole number, 1 to 1024");
  EXPECT_EQ(ErrorOf("threads: many"), "t.yaml:1:10: threads is \"many\"; must be a whole number, 0 to 1024");
  EXPECT_EQ(ErrorOf("threads: 99999999999999999999"),
            "t.yaml:1:10: threads is \"99999999999999999999\"; must be a whole number, 0 to 1024");
  EXPECT_EQ(ErrorOf("threads: \"2\""), "t.yaml:1:10: threads is the text \"2\"; must be 0 to 1024, without quotes");
  EXPECT_EQ(ErrorOf("drain: {timeout_s: .nan}"),
            "t.yaml:1:20: drain.timeout_s is \".nan\"; must be a number, 0 to 86400");
  EXPECT_EQ(ErrorOf("drain: {timeout_s: nan}"),
            "t.yaml:1:20: drain.timeout_s is \"nan\"; must be a number, 0 to 86400");
  EXPECT_EQ(ErrorOf("pin_threads: 1"), "t.yaml:1:14: pin_threads is \"1\"; must be true or false");
  EXPECT_EQ(ErrorOf("device: gpu"), "t.yaml:1:9: device is \"gpu\"; must be auto, cpu or cuda");
  EXPECT_EQ(ErrorOf("version: 2"), "t.yaml:1:10: version is \"2\"; must be 1");
  EXPECT_EQ(ErrorOf("threads:\n"), "t.yaml:1:1: threads has no value; must be 0 to 1024");
  EXPECT_EQ(ErrorOf("threads: [1, 2]"), "t.yaml:1:10: threads is a list; must be one value: 0 to 1024");
  EXPECT_EQ(ErrorOf("model: {a: b}"), "t.yaml:1:8: model is a mapping; must be one value: text");
  EXPECT_THAT(ErrorOf("kv: 16"), HasSubstr("t.yaml:1:5: kv must hold keys"));
}

TEST(Config, ATierIsKnownByTheNameThatTheEngineGivesIt) {
  for (const Tier tier : kAllTiers) {
    const absl::StatusOr<Config> config =
        LoadYaml(absl::StrCat("sparsity: {default_tier: ", std::string(Name(tier)), "}"));
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->server.default_tier, tier);
    EXPECT_THAT(FormatConfig(*config), HasSubstr(absl::StrCat("default_tier: \"", std::string(Name(tier)), "\"")));
  }
  EXPECT_EQ(ErrorOf("sparsity: {default_tier: best}"),
            "t.yaml:1:26: sparsity.default_tier is \"best\"; must be dense, exact, high, balanced or fast");
  EXPECT_THAT(ErrorOf("sparsity: {default_tier: Exact}"), HasSubstr("is \"Exact\"; must be dense, exact"));
  EXPECT_THAT(ErrorOf("sparsity: {default_tier: }"), HasSubstr("has no value"));
}

TEST(Config, TheDefaultTierIsOneThatRequestsMayAskFor) {
  const auto sparsity = [](absl::string_view highest, absl::string_view tier, absl::string_view lowest) {
    return ErrorOf(
        absl::StrCat("sparsity: {highest_tier: ", highest, ", default_tier: ", tier, ", lowest_tier: ", lowest, "}"));
  };
  EXPECT_EQ(sparsity("high", "high", "high"), "no error");
  EXPECT_EQ(sparsity("dense", "fast", "fast"), "no error");
  EXPECT_EQ(sparsity("high", "exact", "fast"),
            "sparsity.default_tier is \"exact\"; must be a tier that requests may ask for: sparsity.highest_tier is "
            "\"high\", sparsity.lowest_tier is \"fast\"");
  EXPECT_THAT(sparsity("dense", "fast", "balanced"), HasSubstr("sparsity.default_tier is \"fast\"; must be a tier"));
  EXPECT_EQ(sparsity("high", "exact", "dense"),
            "sparsity.lowest_tier is \"dense\"; must not be of better quality than the highest: sparsity.highest_tier "
            "is \"high\"");
}

TEST(Config, TheServersShadowChecksKeepToItsOwnLimit) {
  EXPECT_EQ(
      ErrorOf("sparsity: {shadow_every: 9, min_shadow_every: 10}"),
      "sparsity.shadow_every is \"9\"; must be 0 or at least what requests may name: sparsity.min_shadow_every is "
      "\"10\"");
  EXPECT_EQ(ErrorOf("sparsity: {shadow_every: 10, min_shadow_every: 10}"), "no error");
  EXPECT_EQ(ErrorOf("sparsity: {shadow_every: 0, min_shadow_every: 10}"), "no error");
  EXPECT_THAT(ErrorOf("sparsity: {shadow_every: 1000000001}"), HasSubstr("must be a whole number, 0 to 1000000000"));
  EXPECT_THAT(ErrorOf("sparsity: {min_shadow_every: 0}"), HasSubstr("must be a whole number, 1 to 1000000000"));
}

// Each from its own source: only together are they wrong.
TEST(Config, KeysThatDoNotFitTogetherAreFoundWhereverTheyWereSet) {
  const absl::StatusOr<Config> config = LoadConfig({.yaml = "sparsity: {default_tier: fast}",
                                                    .yaml_name = "t.yaml",
                                                    .environment = {{"DEJAVUD_SPARSITY_HIGHEST_TIER", "exact"}},
                                                    .flags = {{"sparsity.lowest_tier", "high"}}});
  EXPECT_THAT(std::string(config.status().message()), HasSubstr("sparsity.default_tier is \"fast\""));
}

TEST(Config, ListenNeedsAHostAndAPort) {
  for (const char* good : {"127.0.0.1:0", "localhost:65535", "[::1]:50051", "0.0.0.0:1"}) {
    EXPECT_TRUE(LoadYaml(absl::StrCat("listen: \"", good, "\"")).ok()) << good;
  }
  for (const char* bad :
       {"", ":", "50051", ":50051", "localhost", "localhost:", "localhost:65536", "localhost:-1", "::1:5",
        "localhost:+1", "localhost: 1", "[]:1", "a b:1", "unix:/tmp/socket", "localhost:99999999999"}) {
    EXPECT_THAT(ErrorOf(absl::StrCat("listen: \"", bad, "\"")), HasSubstr("must be HOST:PORT")) << bad;
  }
}

TEST(Config, AnUnknownKeyIsAnErrorThatSuggestsTheNearestOne) {
  EXPECT_EQ(ErrorOf("a: 1\n"), "t.yaml:1:1: unknown key a");
  EXPECT_EQ(ErrorOf("kv:\n  block_token: 1\n"),
            "t.yaml:2:3: unknown key kv.block_token; did you mean kv.block_tokens?");
  EXPECT_EQ(ErrorOf("block_tokens: 1"), "t.yaml:1:1: unknown key block_tokens; did you mean kv.block_tokens?");
  EXPECT_EQ(ErrorOf("schedular: {max_batch: 1, x: {y: 1}}"),
            "t.yaml:1:1: unknown key schedular; did you mean scheduler?");
  EXPECT_EQ(ErrorOf("kv: {block_tokens: 1, a: {b: 1}}"), "t.yaml:1:23: unknown key kv.a");
}

TEST(Config, NamesTheFirstErrorsOfAFileOfSomethingElse) {
  std::string yaml;
  for (int i = 0; i < 1000; ++i) absl::StrAppend(&yaml, "some_key_", i, ": 1\n");
  const std::string error = ErrorOf(yaml);
  EXPECT_EQ(std::count(error.begin(), error.end(), '\n'), 20) << error;
  EXPECT_THAT(error, HasSubstr("t.yaml:20:1: unknown key some_key_19"));
  EXPECT_THAT(error, HasSubstr("t.yaml:21:1: more is wrong from here on"));
  EXPECT_THAT(error, Not(HasSubstr("some_key_20")));
}

TEST(Config, AllErrorsAreReportedAtOnce) {
  EXPECT_EQ(ErrorOf("threads: -1\nfoo: 1\n"),
            "t.yaml:1:10: threads is \"-1\"; must be a whole number, 0 to 1024\nt.yaml:2:1: unknown key foo");
}

TEST(Config, AKeyThatStandsThereTwiceIsAnError) {
  EXPECT_EQ(ErrorOf("threads: 1\nmodel: m\nthreads: 1\n"), "t.yaml:3:1: the key threads stands there twice");
  EXPECT_EQ(ErrorOf("kv: {block_tokens: 1}\nkv: {memory_mib: 1}\n"), "t.yaml:2:1: the key kv stands there twice");
  EXPECT_THAT(ErrorOf("kv: {block_tokens: 1}\nkv.block_tokens: 2\n"),
              HasSubstr("t.yaml:2:1: the key kv.block_tokens stands"));
}

TEST(Config, WhatIsNotAPlainConfigurationFileIsRefusedWithItsPlace) {
  EXPECT_EQ(ErrorOf("threads: &a 1"), "t.yaml:1:10: anchors are not allowed");
  EXPECT_THAT(ErrorOf("kv: &a {block_tokens: 1}\nscheduler:\n  <<: *a\n"), HasSubstr("anchors are not allowed"));
  EXPECT_THAT(ErrorOf("threads: !!int 1"), HasSubstr("the tag tag:yaml.org,2002:int is not allowed"));
  EXPECT_THAT(ErrorOf("threads: 1\n---\nthreads: 2\n"), HasSubstr("a second document"));
  EXPECT_THAT(ErrorOf("- 1\n"), HasSubstr("t.yaml:1:1: the file must hold"));
  EXPECT_THAT(ErrorOf("hello"), HasSubstr("t.yaml:1:1: the file must hold"));
  EXPECT_THAT(ErrorOf("threads: 1\n  kv: {\n"), HasSubstr("t.yaml:2:"));
  EXPECT_THAT(ErrorOf("? [a, b]\n: 1\n"), HasSubstr("a key must be a plain word"));
  EXPECT_THAT(ErrorOf("threads: *nothing"), HasSubstr("t.yaml:1:"));
  EXPECT_EQ(ErrorOf("threads: 1\nmodel: \xFF\n"), "t.yaml:2:8: not UTF-8 text");
  EXPECT_EQ(ErrorOf(std::string("threads: 1\n\0", 12)), "t.yaml:2:1: not UTF-8 text");
}

TEST(Config, ALargeOrDeepFileIsRefused) {
  EXPECT_EQ(ErrorOf(std::string((1 << 20) + 1, '#')), "t.yaml: longer than 1048576 bytes");
  EXPECT_THAT(ErrorOf("threads: " + std::string(100, '[') + std::string(100, ']')), HasSubstr("nested deeper than 16"));
  EXPECT_THAT(ErrorOf("threads: " + std::string(100000, '[')), Not(HasSubstr("no error")));
  EXPECT_THAT(ErrorOf("threads: " + std::string(100000, '{')), Not(HasSubstr("no error")));
}

TEST(Config, AnUnknownOrWrongEnvironmentVariableIsAnError) {
  const absl::StatusOr<Config> config =
      LoadConfig({.yaml = {},
                  .yaml_name = {},
                  .environment = {{"DEJAVUD_THREAD", "2"}, {"DEJAVUD_MODEL", "\xFF"}, {"DEJAVUD_KV_BLOCK_TOKENS", ""}},
                  .flags = {}});
  EXPECT_EQ(config.status().message(),
            "environment: DEJAVUD_KV_BLOCK_TOKENS: kv.block_tokens is \"\"; must be a whole number, 1 to 1024\n"
            "environment: DEJAVUD_MODEL: model is not valid UTF-8\n"
            "environment: unknown variable DEJAVUD_THREAD; did you mean DEJAVUD_THREADS?");
}

TEST(CommandLine, ReadsFlagsAndFile) {
  const std::string file = WriteTemporary("good.yaml", "threads: 2\nkv: {block_tokens: 8}\npin_threads: true\n");
  const ParsedCommandLine parsed =
      Parse({"--model", "dir", "--listen=127.0.0.1:0", "--port-file", "p", "--served-model-name", "opt", "--config",
             file.c_str(), "--threads", "1", "--no-pin-threads", "--reflection=false", "--predictor", "none",
             "--no-sparsity-fallback", "--sparsity-default-tier=balanced"});
  ASSERT_FALSE(parsed.exit_code.has_value());
  EXPECT_EQ(parsed.config.engine.model, "dir");
  EXPECT_EQ(parsed.config.server.listen, "127.0.0.1:0");
  EXPECT_EQ(parsed.config.server.port_file, "p");
  EXPECT_EQ(parsed.config.server.served_model_name, "opt");
  EXPECT_EQ(parsed.config.engine.threads, 1);
  EXPECT_EQ(parsed.config.engine.kv.block_tokens, 8);
  EXPECT_FALSE(parsed.config.engine.pin_threads);
  EXPECT_FALSE(parsed.config.server.reflection);
  EXPECT_EQ(parsed.config.engine.predictor, "none");
  EXPECT_FALSE(parsed.config.engine.shadow_fallback);
  EXPECT_EQ(parsed.config.server.default_tier, Tier::kBalanced);
}

TEST(CommandLine, TakesTheFileAndKeysFromTheEnvironment) {
  const std::string file = WriteTemporary("environment.yaml", "model: m\nthreads: 2\n");
  ASSERT_EQ(setenv("DEJAVUD_CONFIG", file.c_str(), 1), 0);
  ASSERT_EQ(setenv("DEJAVUD_KV_BLOCK_TOKENS", "4", 1), 0);
  const ParsedCommandLine parsed = Parse({});
  unsetenv("DEJAVUD_CONFIG");
  unsetenv("DEJAVUD_KV_BLOCK_TOKENS");
  ASSERT_FALSE(parsed.exit_code.has_value());
  EXPECT_EQ(parsed.config.engine.model, "m");
  EXPECT_EQ(parsed.config.engine.threads, 2);
  EXPECT_EQ(parsed.config.engine.kv.block_tokens, 4);
}

TEST(CommandLine, WrongUsageExitsWithTwoAndNamesTheFlag) {
  const auto usage_error = [](const std::vector<const char*>& arguments) {
    const Outcome run = RunAndExit(arguments);
    EXPECT_EQ(run.exit_code, 2);
    EXPECT_EQ(run.out, "");
    return run.err;
  };
  EXPECT_THAT(usage_error({}), HasSubstr("no model"));
  EXPECT_THAT(usage_error({"--threds", "1"}), HasSubstr("--threds"));
  EXPECT_THAT(usage_error({"--model", "m", "extra"}), HasSubstr("extra"));
  EXPECT_THAT(usage_error({"--threads"}), HasSubstr("--threads"));
  EXPECT_THAT(usage_error({"--threads", "1", "--threads", "2"}), HasSubstr("--threads"));
  EXPECT_THAT(usage_error({"--threads", "-1"}), HasSubstr("threads is \"-1\"; must be a whole number, 0 to 1024"));
  EXPECT_THAT(usage_error({"--sparsity-default-tier", "best"}), HasSubstr("must be dense, exact, high"));
  EXPECT_THAT(usage_error({"--pin-threads=maybe"}), HasSubstr("must be true or false"));
}

TEST(CommandLine, AWrongConfigurationExitsWithOne) {
  const std::string file = WriteTemporary("bad.yaml", "threads: x\n");
  const Outcome bad = RunAndExit({"--config", file.c_str()});
  EXPECT_EQ(bad.exit_code, 1);
  EXPECT_THAT(bad.err, HasSubstr(file + ":1:10: threads is \"x\""));
  EXPECT_EQ(RunAndExit({"--check-config", "--config", file.c_str()}).exit_code, 1);
  EXPECT_EQ(RunAndExit({"--check-config", "--config", "/nowhere/x.yaml"}).exit_code, 1);
  EXPECT_EQ(RunAndExit({"--check-config", "--config", "/"}).exit_code, 1);
  EXPECT_EQ(RunAndExit({"--check-config", "--sparsity-highest-tier", "high"}).exit_code, 1);
}

TEST(CommandLine, APlanTakesFromTheKindOfDeviceWhatNoFlagSays) {
  EXPECT_FALSE(Parse({"--model", "opt-1.3b"}).plan.has_value());
  const ParsedCommandLine known = Parse({"--plan", "--model", "opt-1.3b", "--plan-device", "l40s"});
  ASSERT_TRUE(known.plan.has_value());
  EXPECT_EQ(known.exit_code, std::nullopt);
  EXPECT_EQ(known.config.engine.model, "opt-1.3b");
  EXPECT_EQ(known.plan->devices, 1);
  EXPECT_EQ(known.plan->memory_gib, 45.0);
  EXPECT_EQ(known.plan->bandwidth_gbs, 864.0);
  EXPECT_EQ(known.plan->all_reduce_us, 30.0);
  EXPECT_FALSE(known.plan->json);

  const ParsedCommandLine stated =
      Parse({"--plan=json", "--model", "opt-1.3b", "--plan-device", "h100", "--plan-devices", "16", "--plan-memory-gib",
             "94", "--plan-bandwidth-gbs", "3900", "--plan-bandwidth-share", "0.5", "--plan-context", "7"});
  ASSERT_TRUE(stated.plan.has_value());
  EXPECT_TRUE(stated.plan->json);
  EXPECT_EQ(stated.plan->memory_gib, 94.0);
  EXPECT_EQ(stated.plan->bandwidth_gbs, 3900.0);
  EXPECT_EQ(stated.plan->bandwidth_share, 0.5);
  EXPECT_EQ(stated.plan->all_reduce_us, 30.0);  // more than one host has
  EXPECT_EQ(stated.plan->context_tokens, 7);
  EXPECT_EQ(Parse({"--plan", "--model", "m", "--plan-device", "h100", "--plan-all-reduce-us", "0"}).plan->all_reduce_us,
            0.0);
}

TEST(CommandLine, APlanWithoutADeviceIsAUsageError) {
  const Outcome none = RunAndExit({"--plan", "--model", "opt-1.3b"});
  EXPECT_EQ(none.exit_code, 2);
  EXPECT_THAT(none.err, HasSubstr("--plan needs --plan-device or --plan-memory-gib"));
  const Outcome cpu = RunAndExit({"--plan", "--model", "m", "--plan-device", "cpu", "--plan-memory-gib", "8"});
  EXPECT_EQ(cpu.exit_code, 2);
  EXPECT_THAT(cpu.err, HasSubstr("--plan-device cpu needs --plan-bandwidth-gbs"));
  const Outcome alone = RunAndExit({"--plan-devices", "2", "--model", "m"});
  EXPECT_EQ(alone.exit_code, 2);
  EXPECT_THAT(alone.err, HasSubstr("--plan-devices requires --plan"));
}

TEST(CommandLine, CheckConfigIsQuietWhenAllIsWell) {
  const Outcome run = RunAndExit({"--check-config", "--config", EXAMPLE_CONFIG});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_EQ(run.out + run.err, "");
}

TEST(CommandLine, PrintConfigCanBeFedBack) {
  const Outcome first = RunAndExit({"--print-config", "--threads", "7", "--model", "my models/\"opt\""});
  EXPECT_EQ(first.exit_code, 0);
  EXPECT_THAT(first.out, HasSubstr("threads: 7\n"));
  const std::string file = WriteTemporary("printed.yaml", first.out);
  EXPECT_EQ(RunAndExit({"--print-config", "--config", file.c_str()}).out, first.out);
}

TEST(CommandLine, HelpNamesEveryFlagItsVariableAndItsDefault) {
  const Outcome run = RunAndExit({"--help"});
  EXPECT_EQ(run.exit_code, 0);
  Config defaults;
  for (const Option& option : OptionTable(&defaults)) {
    EXPECT_THAT(run.out, AllOf(HasSubstr(FlagName(option.key)), HasSubstr(EnvironmentName(option.key)),
                               HasSubstr(OptionText(option))));
  }
}

TEST(CommandLine, VersionIsOneLine) {
  const Outcome run = RunAndExit({"--version"});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_THAT(run.out, testing::MatchesRegex("dejavud [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

}  // namespace
}  // namespace dejavu
