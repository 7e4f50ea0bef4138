// EndOutput: the end of a program that writes text to standard output. Main thread.
#ifndef KERNELS_BASE_END_OUTPUT_H_
#define KERNELS_BASE_END_OUTPUT_H_

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace dejavu {

// `exit_code`, unless what was written did not arrive, on a full disk for instance: then no program has succeeded.
inline int EndOutput(const char* program, int exit_code) {
  constexpr int kFailed = 1;
  errno = 0;
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return exit_code;
  std::fprintf(stderr, "%s: cannot write to standard output: %s\n", program,
               errno != 0 ? std::strerror(errno) : "some of it was lost");
  return exit_code == 0 ? kFailed : exit_code;
}

}  // namespace dejavu

#endif  // KERNELS_BASE_END_OUTPUT_H_
