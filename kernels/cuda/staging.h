// Copies between the host and the device, through pinned memory: uploads return before the device has them, downloads
// arrive when the host has waited. Like the queue, one thread at a time.
#ifndef KERNELS_CUDA_STAGING_H_
#define KERNELS_CUDA_STAGING_H_

#include <array>
#include <cstdint>
#include <deque>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

class Staging {
 public:
  // RESOURCE_EXHAUSTED without memory to be pinned. `queue` must outlive it.
  static absl::StatusOr<std::unique_ptr<Staging>> Create(DeviceQueue& queue);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Those of Backend.
  void Upload(Tensor target, const void* source);
  void Download(void* target, Tensor source);
  uint64_t Mark();
  void Await(uint64_t mark);

  // For the device: what was downloaded is there, and all of the pinned memory is free again.
  void Wait();

 private:
  struct Fetched {
    void* target;
    const void* place;
    int64_t bytes;
  };
  static constexpr uint64_t kMarks = 2;
  static constexpr int kFirstMarkEvent = 64;  // of the module's; those before it are Backend::Stamp's

  Staging(DeviceQueue& queue, char* memory) : queue_(queue), memory_(memory) {}
  void UploadLarge(Tensor target, const char* source);
  void Send(char* to, int64_t to_stride, const char* from, int64_t row_bytes, int64_t rows);
  char* Take(int64_t bytes);
  void Fill(int64_t count);
  static int EventOf(uint64_t mark) { return kFirstMarkEvent + static_cast<int>(mark % kMarks); }

  DeviceQueue& queue_;
  // Pinned, two parts of kStagingBytes, used as a ring: copies under way lie between `released_` and `taken_`, which
  // count all bytes so far.
  char* const memory_;
  int64_t taken_ = 0, released_ = 0;
  std::deque<Fetched> fetched_;  // downloads under way, in order
  int64_t filled_ = 0;           // those that have arrived
  uint64_t marks_ = 0;
  // By mark, modulo kMarks: downloads before it, since the beginning, and what was taken then.
  std::array<int64_t, kMarks> fetched_at_ = {}, taken_at_ = {};
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_STAGING_H_
