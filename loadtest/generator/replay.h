// A trace of requests to be sent again: when, how long, which seed and tier; never text. CSV with a header line, or
// JSON lines, among them those of the daemon's access log (log.format: json). Errors name the file and the line.
#ifndef LOADTEST_GENERATOR_REPLAY_H_
#define LOADTEST_GENERATOR_REPLAY_H_

#include <cstdint>
#include <istream>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace dejavu {

struct ReplayedRequest {
  double offset_s = 0.0;  // since the first one
  int32_t prompt_tokens = 1;
  int32_t max_new_tokens = 1;
  std::optional<uint64_t> seed;
  std::string tier;  // empty: the server's default
  std::string tenant, urgency;
};

// In order of time, the first at 0. Lines of the daemon's log that are about something else are passed over.
absl::StatusOr<std::vector<ReplayedRequest>> ReadReplay(const std::string& path);
// `name` is for messages.
absl::StatusOr<std::vector<ReplayedRequest>> ParseReplay(std::istream* in, const std::string& name);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_REPLAY_H_
