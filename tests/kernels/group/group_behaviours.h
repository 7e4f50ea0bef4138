// What every form of a group must do, as one rank sees it. All ranks make the same call; what each of them brings
// follows from a seed, so each knows what must come out.
#ifndef TESTS_KERNELS_GROUP_GROUP_BEHAVIOURS_H_
#define TESTS_KERNELS_GROUP_GROUP_BEHAVIOURS_H_

#include <cstdint>
#include <string>

#include "kernels/communicator.h"

namespace dejavu {

// What went wrong, or nothing. `bits`, where wanted, becomes a hash of everything that the calls gave.

// AllReduces of many shapes, contiguous and strided: x_0 + x_1 + ... to the last bit, and nothing beside the view
// changed.
std::string SumsInTheOrderOfRanks(Communicator& group);
std::string BroadcastsWhatRankZeroHas(Communicator& group);
std::string GathersInTheOrderOfRanks(Communicator& group);
// Calls of random kinds and sizes; now and then a rank comes late.
std::string DoesRandomCalls(Communicator& group, int calls, uint64_t seed, uint64_t* bits = nullptr);

}  // namespace dejavu

#endif  // TESTS_KERNELS_GROUP_GROUP_BEHAVIOURS_H_
