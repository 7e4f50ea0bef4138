#include "kernels/group/agree.h"

#include <cstdio>
#include <string>
#include <vector>

namespace dejavu {
namespace {

// A status as ranks send it, in front of the word.
struct Said {
  int32_t code = 0;
  char message[380] = {};
};

Said Say(const absl::Status& status) {
  Said said;
  said.code = static_cast<int32_t>(status.code());
  std::snprintf(said.message, sizeof said.message, "%s", std::string(status.message()).c_str());
  return said;
}

absl::Status Understand(const Said& said) {
  const std::string message(said.message, strnlen(said.message, sizeof said.message));
  return absl::Status(static_cast<absl::StatusCode>(said.code), message);
}

// What rank `rank` said, to the others.
absl::Status Quote(int rank, const Said& said) {
  if (said.code == 0) return absl::OkStatus();
  char message[sizeof said.message];
  std::snprintf(message, sizeof message, "rank %d: %.360s", rank, said.message);
  return absl::Status(static_cast<absl::StatusCode>(said.code), message);
}

}  // namespace

absl::Status AgreeOnBytes(
    Communicator& group, const absl::Status& mine, void* word, int64_t bytes,
    absl::FunctionRef<absl::Status(int rank, const absl::Status& said, const void* of_rank)> judge) {
  std::vector<char> own(sizeof(Said) + bytes);
  const auto pack = [&](const absl::Status& status) {
    const Said said = Say(status);
    std::memcpy(own.data(), &said, sizeof said);
    std::memcpy(own.data() + sizeof said, word, bytes);
  };
  pack(mine);
  const int ranks = group.rank() == 0 ? group.size() : 0;
  std::vector<char> all(ranks * own.size());
  group.Gather(all.data(), own.data(), static_cast<int64_t>(own.size()));
  absl::Status verdict;
  Said said;
  for (int rank = 0; rank < ranks && verdict.ok(); ++rank) {
    const char* const of_rank = all.data() + rank * own.size();
    std::memcpy(&said, of_rank, sizeof said);
    verdict = judge(rank, Quote(rank, said), of_rank + sizeof said);
  }
  if (ranks > 0) pack(verdict);
  group.Broadcast(own.data(), static_cast<int64_t>(own.size()));
  std::memcpy(&said, own.data(), sizeof said);
  std::memcpy(word, own.data() + sizeof said, bytes);
  return mine.ok() || said.code == 0 ? Understand(said) : mine;
}

}  // namespace dejavu
