// A group whose ranks are threads of one process: each uses its own communicator. They pass values through buffers that
// the group owns, so a rank that has failed leaves nothing behind that a peer might still read or write.
//
// A group has failed for everybody once a call of any rank has thrown. A rank that cannot go on destroys its
// communicator: peers that need a call from it throw at once. What it has already said still arrives, so destroying is
// also how a rank leaves in good order, whenever its last call has returned.
#ifndef KERNELS_GROUP_THREAD_GROUP_H_
#define KERNELS_GROUP_THREAD_GROUP_H_

#include <memory>
#include <vector>

#include "kernels/communicator.h"

namespace dejavu {

struct ThreadGroupOptions {
  double timeout_s = 10;
  double broadcast_timeout_s = 0;  // of a follower that waits for rank 0's broadcast; 0: timeout_s; may be infinite
};

// Communicator i is rank i's, for its thread alone. They need not be destroyed together.
std::vector<std::unique_ptr<Communicator>> MakeThreadGroup(int size, const ThreadGroupOptions& options = {});

}  // namespace dejavu

#endif  // KERNELS_GROUP_THREAD_GROUP_H_
