#include "engine/eval/tool.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/text/tokenizer.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr int64_t kMaxTextBytes = int64_t{1} << 30;

std::atomic<bool> interrupted{false};

}  // namespace

void LogToStderr(const char* program, bool warnings) {
  spdlog::set_default_logger(spdlog::stderr_logger_mt(program));
  if (warnings) spdlog::set_level(spdlog::level::warn);
}

void StopOnInterrupt() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupted = true; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool Interrupted() { return interrupted; }

absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& model, const std::string& text_file,
                                                int64_t max_tokens) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(model);
  if (absl::IsNotFound(tokenizer.status())) {
    return absl::NotFoundError(
        absl::StrCat(model, ": has no tokenizer, which a text needs (", tokenizer.status().message(), ")"));
  }
  RETURN_IF_ERROR(tokenizer.status());
  ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(text_file, kMaxTextBytes));
  const size_t valid = ValidUtf8Prefix(text);
  if (valid != text.size()) {
    return absl::InvalidArgumentError(absl::StrCat(text_file, ": is not valid UTF-8 at byte ", valid));
  }
  std::vector<int32_t> tokens = (*tokenizer)->EncodePrompt(text);
  if (max_tokens > 0 && max_tokens < static_cast<int64_t>(tokens.size())) tokens.resize(max_tokens);
  if (tokens.size() < 2) {
    return absl::InvalidArgumentError(absl::StrCat(text_file, ": has ", tokens.size(),
                                                   " tokens, with what stands around a prompt; at least 2 are needed"));
  }
  return tokens;
}

absl::Status CheckWritable(const std::string& path) {
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (path.empty() || access(folder.empty() ? "." : folder.c_str(), W_OK) == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(path, ": cannot be written: ", std::strerror(errno)));
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  const std::string aside = absl::StrCat(path, ".", getpid(), ".tmp");
  std::ofstream file(aside, std::ios::binary);
  file << text;
  file.close();
  if (file && std::rename(aside.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const std::string reason = std::strerror(errno);
  std::remove(aside.c_str());
  return absl::UnavailableError(absl::StrCat(path, ": cannot be written: ", reason));
}

ProgressLine::ProgressLine(std::string program)
    : program_(std::move(program)),
      on_terminal_(isatty(STDERR_FILENO) != 0),
      part_start_(std::chrono::steady_clock::now()),
      last_(part_start_) {}

ProgressLine::~ProgressLine() {
  if (on_terminal_ && shown_) std::fputs("\r\x1b[K", stderr);
}

void ProgressLine::Show(absl::string_view part, double done) {
  const SteadyTime now = std::chrono::steady_clock::now();
  const bool new_part = part != part_;
  if (new_part) {
    part_ = std::string(part);
    part_start_ = now;
  }
  if (!new_part && now - last_ < (on_terminal_ ? std::chrono::milliseconds(200) : std::chrono::milliseconds(5000))) {
    return;
  }
  last_ = now;
  shown_ = true;
  std::string line = absl::StrCat(on_terminal_ ? "\r" : "", program_, ": ", part, part.empty() ? "" : ", ");
  absl::StrAppendFormat(&line, "%3.0f %%", 100.0 * done);
  if (done > 0.0) {
    const double spent_s = Seconds(part_start_, now);
    const auto left = static_cast<int64_t>(spent_s * (1.0 - done) / done + 0.5);
    absl::StrAppendFormat(&line, ", %d:%02d left", left / 60, left % 60);
  }
  std::fputs(absl::StrCat(line, on_terminal_ ? "\x1b[K" : "\n").c_str(), stderr);
}

}  // namespace dejavu
