// Steps that were recorded and are run again without calling their ops (Backend::Run).
#ifndef KERNELS_CUDA_RECORDINGS_H_
#define KERNELS_CUDA_RECORDINGS_H_

#include <cstdint>
#include <unordered_map>

#include "absl/functional/function_ref.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/staging.h"

namespace dejavu::cuda {

class Recordings {
 public:
  Recordings(DeviceQueue& queue, Staging& staging) : queue_(queue), staging_(staging) {}
  ~Recordings() { ForgetGraphs(); }
  Recordings(const Recordings&) = delete;
  Recordings& operator=(const Recordings&) = delete;

  // The first time the ops run as they are, and scratch grows to what they need; the second time they are recorded.
  // `ops` leaves nothing held back, and nothing is before it.
  void Run(uint64_t key, absl::FunctionRef<void()> ops);

  // All are recorded anew when they come again.
  void ForgetGraphs();

 private:
  struct Recording {
    bool seen = false;     // run once: scratch has the size that it needs
    bool refused = false;  // the device has no memory for the graph
    DeviceQueue::Graph graph;
  };

  void Record(Recording& recording, absl::FunctionRef<void()> ops);

  DeviceQueue& queue_;
  Staging& staging_;
  std::unordered_map<uint64_t, Recording> recordings_;  // by key
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_RECORDINGS_H_
