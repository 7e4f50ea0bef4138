// What the tests of the emulator share.
#ifndef TESTS_SIMT_SIMT_TESTING_H_
#define TESTS_SIMT_SIMT_TESTING_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "simt.h"

namespace dejavu::simt {

inline constexpr uint64_t kOrders = 50;  // 0, the natural one, and so many less one drawn ones

template <typename Params>
void ExpectRuns(const Kernel<Params>& kernel, const Params& params, const Launch& launch) {
  const absl::Status status = Run(kernel, params, launch);
  EXPECT_TRUE(status.ok()) << status << " in order " << launch.order;
}

template <typename Params>
std::string Error(const Kernel<Params>& kernel, const Params& params, const Launch& launch) {
  return std::string(Run(kernel, params, launch).message());
}

}  // namespace dejavu::simt

#endif  // TESTS_SIMT_SIMT_TESTING_H_
