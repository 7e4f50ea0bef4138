// A group whose ranks are processes that Open MPI's mpirun started. MPI is in a module that is loaded here
// (kernels/mpi/module.cc): the daemon runs without it.
//
// The module is the file that the environment variable DEJAVU_MPI_MODULE names; without it libdejavu_mpi.so beside the
// executable or in ../lib/dejavu from there.
#ifndef KERNELS_MPI_OPEN_MPI_H_
#define KERNELS_MPI_OPEN_MPI_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/communicator.h"

namespace dejavu {

// As mpirun says in the environment. MpirunSize is 1 without it.
bool UnderMpirun();
int MpirunSize();
int MpirunRank();  // 0 without it

// This process among those on this machine, and whether mpirun gave it some of the CPUs only.
struct MpirunPlace {
  int rank = 0, size = 1;
  bool bound = false;
};
MpirunPlace GetMpirunPlace();

struct MpiOptions {
  double timeout_s = 10;
  double broadcast_timeout_s = 0;  // of a follower that waits for rank 0's broadcast; 0: timeout_s; may be infinite
};

// Once in a process, by all ranks; waits for them. One thread at a time uses the communicator, not always the same.
// UNAVAILABLE without the module or libmpi, FAILED_PRECONDITION without mpirun.
//
// The destructor ends MPI when all ranks come to theirs within the limit or 10 s. After a call that threw, or without
// the others, it leaves MPI as it is, for ending it would hang: then the process should end by _exit(3).
absl::StatusOr<std::unique_ptr<Communicator>> JoinMpiGroup(const MpiOptions& options = {});

}  // namespace dejavu

#endif  // KERNELS_MPI_OPEN_MPI_H_
