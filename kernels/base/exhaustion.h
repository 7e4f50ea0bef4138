// Exhaustion: the system refuses memory or another thread. That is the world's fault, not ours: a program ends with its
// exit code and a sentence, not with SIGABRT and std::bad_alloc. Any thread.
#ifndef KERNELS_BASE_EXHAUSTION_H_
#define KERNELS_BASE_EXHAUSTION_H_

#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <system_error>

#include "absl/status/status.h"

namespace dejavu {

// Where the process has a limit: address space (ulimit -v) or data (ulimit -d), whichever leaves less.
struct AddressSpace {
  int64_t held_bytes = 0, most_bytes = 0;
  const char* limit = "";  // "ulimit -v"

  int64_t left_bytes() const { return most_bytes - held_bytes; }
};
std::optional<AddressSpace> LimitedAddressSpace();

// "the process holds 1 of the 2 bytes that ulimit -v lets it have", or nothing.
std::string DescribeAddressSpace();

// What `call` returns, a Status or StatusOr; RESOURCE_EXHAUSTED where memory or threads ran out in it.
absl::Status MemoryRanOut();
absl::Status NoMoreThreads(const std::system_error& error);
template <typename Call>
auto OrExhausted(const Call& call) -> decltype(call()) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return MemoryRanOut();
  } catch (const std::system_error& error) {
    return NoMoreThreads(error);
  }
}

// From now on a thread that ends by such an exception, a library's for instance, ends the process with `exit_code` and
// says why on standard error. May be called again. `program` is a literal.
void ExitOnExhaustion(const char* program, int exit_code);

}  // namespace dejavu

#endif  // KERNELS_BASE_EXHAUSTION_H_
