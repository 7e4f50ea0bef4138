#include "engine/convert/converter.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/model/weights_file.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"

namespace dejavu {
namespace {

// What a model's directory may hold beside its weights, as far as dejavud reads it.
constexpr const char* kOtherFiles[] = {
    "config.json", "generation_config.json",  "tokenizer.json",    "tokenizer_config.json", "vocab.json",
    "merges.txt",  "special_tokens_map.json", "added_tokens.json", "predictor.safetensors"};

absl::Status CannotWrite(const std::string& path, int error) {
  return absl::UnavailableError(absl::StrCat(path, ": cannot be written: ", std::strerror(error)));
}

// What a path without it leads to is the directory itself.
std::string WithoutSlashes(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

absl::Status CheckTarget(const std::string& out, bool force) {
  if (out.empty()) return absl::InvalidArgumentError("--out is empty; it must name a directory");
  struct stat info;
  if (lstat(out.c_str(), &info) != 0) {
    return errno == ENOENT ? absl::OkStatus() : CannotWrite(out, errno);
  }
  if (!force) return absl::AlreadyExistsError(absl::StrCat(out, ": is there already; --force replaces it"));
  if (S_ISDIR(info.st_mode) && access(absl::StrCat(out, "/", WeightsFile::kName).c_str(), F_OK) == 0) {
    return absl::OkStatus();
  }
  return absl::AlreadyExistsError(
      absl::StrCat(out, ": is there and holds no ", WeightsFile::kName, "; --force replaces only converted models"));
}

// Waits until what a file holds, or which files a directory has, is on the disk.
absl::Status Sync(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return CannotWrite(path, errno);
  const absl::Cleanup close_file = [fd] { close(fd); };
  return fsync(fd) == 0 ? absl::OkStatus() : CannotWrite(path, errno);
}

absl::Status CopyFile(const std::string& from, const std::string& to) {
  constexpr int64_t kStripe = int64_t{1} << 20;
  ASSIGN_OR_RETURN(const std::shared_ptr<RegularFile> source, RegularFile::Open(from));
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> target(std::fopen(to.c_str(), "wbe"), std::fclose);
  if (target == nullptr) return CannotWrite(to, errno);
  std::string stripe;
  for (int64_t done = 0; done < source->size(); done += static_cast<int64_t>(stripe.size())) {
    ASSIGN_OR_RETURN(stripe, source->ReadString(done, std::min(kStripe, source->size() - done)));
    if (std::fwrite(stripe.data(), 1, stripe.size(), target.get()) != stripe.size()) return CannotWrite(to, errno);
  }
  if (std::fflush(target.get()) != 0) return CannotWrite(to, errno);
  return Sync(to);
}

// Where both are there, they change places in one moment, on file systems that can do that.
absl::Status PutInPlace(const std::string& aside, const std::string& out) {
  if (access(out.c_str(), F_OK) != 0) {
    return std::rename(aside.c_str(), out.c_str()) == 0 ? absl::OkStatus() : CannotWrite(out, errno);
  }
  if (renameat2(AT_FDCWD, aside.c_str(), AT_FDCWD, out.c_str(), RENAME_EXCHANGE) == 0) return absl::OkStatus();
  if (errno != EINVAL && errno != ENOSYS) return CannotWrite(out, errno);
  const std::string old = aside + ".old";
  if (std::rename(out.c_str(), old.c_str()) != 0 || std::rename(aside.c_str(), out.c_str()) != 0) {
    return CannotWrite(out, errno);
  }
  return std::rename(old.c_str(), aside.c_str()) == 0 ? absl::OkStatus() : CannotWrite(aside, errno);
}

}  // namespace

absl::StatusOr<Converted> ConvertModel(const ConvertOptions& options, const ConvertProgress& progress) {
  if (IsSynthetic(options.model)) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.model, ": is generated; `dejavu-bench checkpoint` makes a directory of it first"));
  }
  const std::string out = WithoutSlashes(options.out), aside = absl::StrCat(out, ".", getpid(), ".tmp");
  RETURN_IF_ERROR(CheckTarget(out, options.force));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  if (mkdir(aside.c_str(), 0777) != 0) return CannotWrite(aside, errno);
  const absl::Cleanup remove_aside = [&aside] {
    std::error_code ignored;
    std::filesystem::remove_all(aside, ignored);
  };

  const auto part = [&](const char* name) -> LoadProgress {
    return [&progress, name](int64_t done, int64_t total) { return progress(name, done, total); };
  };
  ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, CreateCpuBackend({.threads = 1, .pin = false}));
  ASSIGN_OR_RETURN(LoadedModel model,
                   LoadModel({options.model, options.weights, ""}, config, *backend, part("converting")));
  RETURN_IF_ERROR(WeightsFile::Write(model.weights, config, model.weights_hash,
                                     absl::StrCat(aside, "/", WeightsFile::kName), part("writing")));
  for (const char* name : kOtherFiles) {
    const std::string from = absl::StrCat(options.model, "/", name);
    if (access(from.c_str(), F_OK) == 0) RETURN_IF_ERROR(CopyFile(from, absl::StrCat(aside, "/", name)));
  }
  RETURN_IF_ERROR(Sync(aside));
  RETURN_IF_ERROR(CheckTarget(out, options.force));  // it has taken a while
  RETURN_IF_ERROR(PutInPlace(aside, out));
  return Converted{model.weights.bytes(), Name(model.weights.dtype())};
}

}  // namespace dejavu
