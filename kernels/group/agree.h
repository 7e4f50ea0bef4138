// How the ranks of a group go on together or not at all.
#ifndef KERNELS_GROUP_AGREE_H_
#define KERNELS_GROUP_AGREE_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/communicator.h"

namespace dejavu {

// The function below over words of `bytes`.
absl::Status AgreeOnBytes(
    Communicator& group, const absl::Status& mine, void* word, int64_t bytes,
    absl::FunctionRef<absl::Status(int rank, const absl::Status& said, const void* of_rank)> judge);

// Called by all ranks, each with its status and a word of its own. Rank 0 calls `judge` for one rank after the other:
// with what the rank said, and who it was, as a status, and with its word; the first error is the verdict. `judge` may
// change `*word` of rank 0. OK on every rank, with rank 0's word in `*word`, or on none: a rank that has failed returns
// its own status, the others the verdict.
template <typename Word, typename Judge>
absl::Status Agree(Communicator& group, const absl::Status& mine, Word* word, const Judge& judge) {
  static_assert(std::is_trivially_copyable_v<Word>);
  return AgreeOnBytes(group, mine, word, sizeof(Word), [&](int rank, const absl::Status& said, const void* bytes) {
    Word of_rank;
    std::memcpy(&of_rank, bytes, sizeof(Word));
    return judge(rank, said, of_rank);
  });
}

}  // namespace dejavu

#endif  // KERNELS_GROUP_AGREE_H_
