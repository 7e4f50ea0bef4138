// What the daemon and the MPI module say to each other: messages between two ranks, begun and then tested. What is made
// of them, and how long anybody waits, is decided in the daemon (kernels/mpi/open_mpi.cc).
//
// join, send, receive, test and leave return 0, or another number and a message from `error` (valid until the next
// call). One thread at a time, not always the same.
#ifndef KERNELS_MPI_ABI_H_
#define KERNELS_MPI_ABI_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DEJAVU_MPI_ABI_VERSION 1
#define DEJAVU_MPI_ENTRY "DejavuMpiEntry"  // const DejavuMpiModule* (*)(void); all that the module exports

typedef struct DejavuMpiModule {
  int32_t abi_version;
  const char* (*error)(void);

  // Starts MPI, once in a process. `most_messages` can be under way at once.
  int (*join)(int32_t most_messages, int32_t* rank, int32_t* size);

  // The memory is MPI's until `test` has found the message done. Messages of one tag between two ranks keep their
  // order.
  int (*send)(const void* data, int64_t bytes, int32_t to, int32_t tag);
  int (*receive)(void* data, int64_t bytes, int32_t from, int32_t tag);
  // Moves what is under way. `peer`: of a message that is not done; -1: all are.
  int (*test)(int32_t* peer);

  // Ends MPI, together with all ranks: it waits for them without a limit.
  int (*leave)(void);
} DejavuMpiModule;

#ifdef __cplusplus
}
#endif

#endif  // KERNELS_MPI_ABI_H_
