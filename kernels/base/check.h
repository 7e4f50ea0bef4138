// CHECK(condition) << "context": stops the process when we, not the world, have made a mistake.
// For errors of the world (files, requests, devices) return absl::Status instead. Any thread.
#ifndef KERNELS_BASE_CHECK_H_
#define KERNELS_BASE_CHECK_H_

#include <sstream>

namespace dejavu::internal {

// Collects the message; its destructor prints it with file and line to stderr and aborts.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition);
  [[noreturn]] ~CheckFailure();
  std::ostream& stream() { return message_; }

 private:
  std::ostringstream message_;
};

// Makes both arms of the conditional in CHECK void; `&` binds weaker than `<<`.
struct Voidify {
  void operator&(std::ostream&) const {}
};

}  // namespace dejavu::internal

#define CHECK(condition)     \
  (condition)                \
      ? static_cast<void>(0) \
      : ::dejavu::internal::Voidify() & ::dejavu::internal::CheckFailure(__FILE__, __LINE__, #condition).stream()

#ifdef NDEBUG
#define DCHECK(condition) \
  while (false) CHECK(condition)
#else
#define DCHECK(condition) CHECK(condition)
#endif

#endif  // KERNELS_BASE_CHECK_H_
