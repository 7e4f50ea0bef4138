#include "kernels/base/exhaustion.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

constexpr int kReason = 400;

// As statm has it, in pages; no memory is taken for it.
bool ReadHeldPages(int64_t* all, int64_t* data) {
  char text[256] = "";
  const int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const ssize_t got = read(fd, text, sizeof text - 1);
  close(fd);
  long long total = 0, of_data = 0;
  if (got <= 0 || std::sscanf(text, "%lld %*d %*d %*d %*d %lld", &total, &of_data) != 2) return false;
  *all = total;
  *data = of_data;
  return true;
}

void Describe(char* text, size_t size) {
  const std::optional<AddressSpace> space = LimitedAddressSpace();
  text[0] = '\0';
  if (!space.has_value()) return;
  std::snprintf(text, size, "the process holds %lld of the %lld bytes that %s lets it have",
                static_cast<long long>(space->held_bytes), static_cast<long long>(space->most_bytes), space->limit);
}

// Of the process, as its terminate handler is.
std::atomic<const char*> program_name{""};
std::atomic<int> exit_code_of_exhaustion{1};
std::terminate_handler otherwise = nullptr;

// Whoever threw may hold any lock: nothing but system calls.
[[noreturn]] void EndProcess(const char* reason) {
  char space[kReason];
  Describe(space, sizeof space);
  dprintf(STDERR_FILENO, "%s: %s%s%s\n", program_name.load(), reason, space[0] != '\0' ? ": " : "", space);
  _exit(exit_code_of_exhaustion);
}

void OnTerminate() {
  try {
    if (std::current_exception() != nullptr) throw;
  } catch (const std::bad_alloc&) {
    EndProcess("memory ran out");
  } catch (const std::system_error& error) {
    if (error.code() == std::errc::resource_unavailable_try_again) EndProcess("no further thread could be started");
  } catch (...) {
  }
  otherwise();
  std::abort();
}

}  // namespace

std::optional<AddressSpace> LimitedAddressSpace() {
  int64_t all = 0, data = 0;
  if (!ReadHeldPages(&all, &data)) return std::nullopt;
  const int64_t page = sysconf(_SC_PAGESIZE);
  std::optional<AddressSpace> tightest;
  const auto look = [&](auto resource, int64_t held_pages, const char* name) {
    rlimit limit;
    if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
    const AddressSpace space{held_pages * page, static_cast<int64_t>(limit.rlim_cur), name};
    if (!tightest.has_value() || space.left_bytes() < tightest->left_bytes()) tightest = space;
  };
  look(RLIMIT_AS, all, "ulimit -v");
  look(RLIMIT_DATA, data, "ulimit -d");
  return tightest;
}

std::string DescribeAddressSpace() {
  char text[kReason];
  Describe(text, sizeof text);
  return text;
}

absl::Status MemoryRanOut() {
  const std::string space = DescribeAddressSpace();
  return absl::ResourceExhaustedError(absl::StrCat("memory ran out", space.empty() ? "" : ": ", space));
}

absl::Status NoMoreThreads(const std::system_error& error) {
  const std::string space = DescribeAddressSpace();
  return absl::ResourceExhaustedError(absl::StrCat("the system refuses what is asked of it, such as another thread: ",
                                                   error.what(), space.empty() ? "" : "; ", space));
}

void ExitOnExhaustion(const char* program, int exit_code) {
  program_name = program;
  exit_code_of_exhaustion = exit_code;
  if (std::get_terminate() != OnTerminate) otherwise = std::set_terminate(OnTerminate);
}

}  // namespace dejavu
