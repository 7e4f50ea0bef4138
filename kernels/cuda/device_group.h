// A group of ranks whose all-reduces are queued on the device, where they cost the host nothing that could be measured;
// the rest is the host's. NCCL gives all ranks the same bits, in every run the same. With three ranks and more a row's
// last bits may depend on how many rows are added up with it: its place in the array decides in which order the ranks
// come.
#ifndef KERNELS_CUDA_DEVICE_GROUP_H_
#define KERNELS_CUDA_DEVICE_GROUP_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/communicator.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/held_ops.h"
#include "kernels/cuda/recordings.h"

namespace dejavu::cuda {

// Backend::JoinGroup. The group leaves before the three are gone. UNAVAILABLE on all ranks where one cannot join.
absl::StatusOr<std::unique_ptr<Communicator>> JoinDeviceGroup(DeviceQueue& queue, HeldOps& held, Recordings& recordings,
                                                              std::unique_ptr<Communicator> host);

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_DEVICE_GROUP_H_
