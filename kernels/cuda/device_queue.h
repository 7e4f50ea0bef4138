// A device's one queue: all that the CUDA backend asks of its module's context (kernels/cuda/abi.h) goes through it.
// Once something has failed, every call throws std::runtime_error that names the first failure, or PeerLost if that
// was it: failures of the device have no status to be returned in, and the engine, which called the op, ends by them.
// One thread at a time.
#ifndef KERNELS_CUDA_DEVICE_QUEUE_H_
#define KERNELS_CUDA_DEVICE_QUEUE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/cuda/abi.h"
#include "kernels/cuda/params.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

class DeviceQueue {
 public:
  // `module` must outlive the queue and its buffers. UNAVAILABLE with the module's reason where the device cannot be
  // opened.
  static absl::StatusOr<std::unique_ptr<DeviceQueue>> Open(const DejavuCudaModule* module, int device);
  DeviceQueue(const DeviceQueue&) = delete;
  DeviceQueue& operator=(const DeviceQueue&) = delete;

  const DejavuCudaDevice& device() const { return context_->device; }
  const DejavuCudaModule& module() const { return *context_->module; }
  DejavuCudaContext* context() const { return context_->context; }

  // Throws unless `result`, of a function of the module, is 0. `what` was tried.
  void Try(int result, const char* what);

  // Memory that nobody has taken; at first what the device said.
  int64_t FreeBytes() const { return context_->device.memory_free_bytes - context_->taken_bytes; }
  void SetFreeBytes(int64_t bytes) { context_->device.memory_free_bytes = bytes + context_->taken_bytes; }
  // RESOURCE_EXHAUSTED with the size asked for. The buffer may outlive the queue.
  absl::StatusOr<Buffer> Allocate(int64_t bytes);

  struct Grid {
    int64_t x = 1, y = 1, z = 1;
  };
  // Nothing where the grid is empty.
  template <typename Params>
  void Launch(Kernel kernel, Grid grid, int64_t shared_bytes, const Params& params) {
    LaunchWith(kernel, grid, shared_bytes, &params, sizeof params);
  }

  // Memory that launches leave to each other, by its address: the last launch has written it. It is old when one launch
  // more has come: the next one may read it before it waits. Nobody knows what a replay has written last, nor what is
  // before a capture: all is new then.
  void NoteWritten(const void* memory) { written_at_[memory] = launches_; }
  bool IsOld(const void* memory) const;

  // In a group of devices; x [count]. With `aside` beside what follows, up to JoinAllReduce.
  void AllReduce(float* x, int64_t count, bool aside);
  void JoinAllReduce();
  int64_t all_reduces() const { return all_reduces_; }  // those of replays included

  // What is launched between the two is kept in a graph instead of run.
  struct Graph {
    DejavuCudaGraph* graph = nullptr;  // the device may have no memory for it
    int64_t all_reduces = 0;
  };
  void BeginCapture();
  Graph EndCapture();
  bool capturing() const { return capturing_; }
  void Replay(const Graph& graph);
  void Free(Graph& graph);

 private:
  // The module's context. Buffers hold it, so that it closes after the last of them.
  struct Context {
    const DejavuCudaModule* module = nullptr;
    DejavuCudaContext* context = nullptr;
    DejavuCudaDevice device = {};
    bool kernels_wait = false;  // GridWait is compiled into them: they may overlap
    int64_t taken_bytes = 0;    // of what was free at first

    ~Context() {
      if (context != nullptr) module->close(context);
    }
  };

  explicit DeviceQueue(std::shared_ptr<Context> context) : context_(std::move(context)) {}
  void LaunchWith(Kernel kernel, Grid grid, int64_t shared_bytes, const void* params, uint32_t params_bytes);

  const std::shared_ptr<Context> context_;
  std::string failure_;              // the first one; the device does nothing more after it
  bool peer_lost_ = false;           // that is what failed
  bool follows_all_reduce_ = false;  // the next launch
  bool capturing_ = false;
  int64_t launches_ = 0;
  int64_t known_from_ = 0;  // launch
  std::unordered_map<const void*, int64_t> written_at_;
  int64_t all_reduces_ = 0;
  int64_t all_reduces_before_ = 0;  // the capture under way
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_DEVICE_QUEUE_H_
