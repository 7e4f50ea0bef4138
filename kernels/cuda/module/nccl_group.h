// NCCL, as far as the module uses it. Loaded at the first use, so that the module starts without it; nccl.h is not
// needed to build.
#ifndef KERNELS_CUDA_MODULE_NCCL_GROUP_H_
#define KERNELS_CUDA_MODULE_NCCL_GROUP_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>

namespace dejavu::cuda {

// This rank's part of a group. Functions return why they failed, or "". One thread at a time.
class NcclGroup {
 public:
  // Whether NCCL can be used; with an id [DEJAVU_CUDA_GROUP_ID_BYTES] also makes one.
  static std::string MakeId(char* id);

  // Gives up after so many seconds: a thread then stays behind, which waits for the other ranks.
  static std::string Join(int device, const char* id, int rank, int size, double seconds,
                          std::unique_ptr<NcclGroup>* group);
  ~NcclGroup();  // Leave, or Abort before
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Of float32, in place. `peer_lost`: that is why.
  std::string AllReduce(float* data, int64_t count, cudaStream_t stream, bool* peer_lost);

  // What has gone wrong with what was queued, if NCCL has noticed.
  std::string Trouble();

  // What is under way ends without the others. Nothing more may be queued.
  void Abort();
  // When nothing is under way and all graphs are gone.
  void Leave();

 private:
  NcclGroup(void* communicator, int device, int rank, int size)
      : communicator_(communicator), device_(device), rank_(rank), size_(size) {}

  void* communicator_;  // nullptr: left
  const int device_, rank_, size_;
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_MODULE_NCCL_GROUP_H_
