#include "loadtest/cli/prompt.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <istream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

constexpr size_t kMaxBytes = 64 << 20;  // far more than any server reads

absl::Status ReadAll(std::istream* stream, absl::string_view name, std::string* text) {
  text->resize(kMaxBytes + 1);
  stream->read(text->data(), static_cast<std::streamsize>(text->size()));
  text->resize(static_cast<size_t>(stream->gcount()));
  if (stream->bad()) return absl::InvalidArgumentError(absl::StrCat(name, " cannot be read"));
  if (text->size() > kMaxBytes) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is longer than ", kMaxBytes, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

void AddPromptFlags(CLI::App* command, PromptSource* source, bool with_ids) {
  source->text_flag = command->add_option("text,--prompt", source->text, "Prompt; without one, standard input is read");
  CLI::Option* file = command->add_option("--prompt-file", source->file, "File that holds the prompt, taken as it is");
  file->excludes(source->text_flag);
  command->add_flag("--parse-special", source->parse_special,
                    "Special tokens such as </s> that are written in the prompt are these tokens");
  if (!with_ids) return;
  source->ids_flag =
      command->add_option("--token-ids", source->ids, "Prompt as token ids, such as 2,5,7; taken as they are");
  source->ids_flag->delimiter(',')->allow_extra_args(false)->excludes(source->text_flag)->excludes(file);
  command->add_option("--truncate-prompt-tokens", source->last_tokens,
                      "Keep only so many last tokens of the prompt; -1: as many as fit");
}

void AddLinesFlag(CLI::App* command, PromptSource* source) {
  CLI::Option* lines = command->add_option("--prompts-file", source->lines_file,
                                           "File that holds a prompt in each line: all of them in one call");
  lines->excludes(source->text_flag)->excludes(source->ids_flag)->excludes(command->get_option("--prompt-file"));
}

absl::Status CheckUtf8(absl::string_view what, absl::string_view text) {
  const size_t valid = ValidUtf8Prefix(text);
  if (valid == text.size()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " is not valid UTF-8 at byte ", valid));
}

absl::Status ReadPrompt(PromptSource* source) {
  if (source->ids_flag != nullptr && source->ids_flag->count() > 0) return absl::OkStatus();
  absl::Status read;
  const std::string& name = source->lines_file.empty() ? source->file : source->lines_file;
  if (!name.empty()) {
    std::ifstream file(name, std::ios::binary);
    if (!file.is_open()) return absl::InvalidArgumentError(absl::StrCat(name, " cannot be opened"));
    read = ReadAll(&file, name, &source->text);
    absl::string_view text = source->text;
    absl::ConsumeSuffix(&text, "\n");
    if (!source->lines_file.empty()) source->lines = absl::StrSplit(text, '\n');
  } else if (source->text_flag->count() == 0) {
    if (isatty(STDIN_FILENO) != 0) std::fputs("Prompt, ended with Ctrl-D:\n", stderr);
    read = ReadAll(&std::cin, "standard input", &source->text);
  }
  return read.ok() ? CheckUtf8("the prompt", source->text) : read;
}

}  // namespace dejavu
