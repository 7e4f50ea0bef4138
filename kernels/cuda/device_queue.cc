#include "kernels/cuda/device_queue.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/communicator.h"
#include "kernels/cuda/kernel_params.h"

namespace dejavu::cuda {

namespace {

// In code for earlier versions GridWait is nothing, whatever the device could do.
constexpr int32_t kWaitsFrom = 90;

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceQueue>> DeviceQueue::Open(const DejavuCudaModule* module, int device) {
  if (module->abi_version != DEJAVU_CUDA_ABI_VERSION) {
    return absl::UnavailableError(absl::StrCat("cuda: the module speaks version ", module->abi_version,
                                               " of the interface, this program ", DEJAVU_CUDA_ABI_VERSION));
  }
  auto context = std::make_shared<Context>();
  context->module = module;
  if (module->open(device, &context->context, &context->device) != 0) {
    context->context = nullptr;
    return absl::UnavailableError(absl::StrCat("cuda: ", module->error()));
  }
  context->kernels_wait = true;
  for (int32_t kernel = 0; kernel < kKernels; ++kernel) {
    DejavuCudaKernel info;
    if (module->kernel_info(context->context, kernel, &info) != 0) {
      return absl::UnavailableError(absl::StrCat("cuda: ", module->error()));
    }
    context->kernels_wait &= std::min(info.binary_version, info.ptx_version) >= kWaitsFrom;
  }
  return std::unique_ptr<DeviceQueue>(new DeviceQueue(std::move(context)));
}

void DeviceQueue::Try(int result, const char* what) {
  if (failure_.empty() && result != 0) {
    failure_ = absl::StrCat("cuda: ", what, ": ", module().error());
    peer_lost_ = result == DEJAVU_CUDA_PEER_LOST;
  }
  if (peer_lost_) throw PeerLost(failure_);
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

absl::StatusOr<Buffer> DeviceQueue::Allocate(int64_t bytes) {
  CHECK(bytes >= 0) << bytes;
  void* data = nullptr;
  if (module().allocate(context(), std::max<int64_t>(bytes, 1), &data) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cuda: cannot allocate ", bytes, " bytes on ", device().name, ": ", module().error()));
  }
  context_->taken_bytes += bytes;
  return Buffer(data, bytes, [context = context_, bytes](void* p) {
    context->module->free(context->context, p);
    context->taken_bytes -= bytes;
  });
}

void DeviceQueue::LaunchWith(Kernel kernel, Grid grid, int64_t shared_bytes, const void* params,
                             uint32_t params_bytes) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  CHECK(shared_bytes <= device().shared_bytes_per_block)
      << NameOf(kernel) << " wants " << shared_bytes << " bytes of shared memory";
  // NCCL does not say whether another launch may begin beside its own; one after a fork or a join has two before it.
  const bool overlaps = !std::exchange(follows_all_reduce_, false) && context_->kernels_wait;
  const DejavuCudaLaunch launch = {
      .kernel = kernel,
      .grid = {static_cast<uint32_t>(grid.x), static_cast<uint32_t>(grid.y), static_cast<uint32_t>(grid.z)},
      .block = {kBlockThreads, 1, 1},
      .shared_bytes = static_cast<uint32_t>(shared_bytes),
      .overlaps = overlaps,
      .params = params,
      .params_bytes = params_bytes};
  Try(module().launch(context(), &launch), NameOf(kernel));
  ++launches_;
}

bool DeviceQueue::IsOld(const void* memory) const {
  const auto written = written_at_.find(memory);
  return launches_ > std::max(known_from_, written == written_at_.end() ? 0 : written->second);
}

void DeviceQueue::AllReduce(float* x, int64_t count, bool aside) {
  Try(module().all_reduce(context(), x, count, aside), "all-reduce");
  follows_all_reduce_ = true;
  ++all_reduces_;
}

void DeviceQueue::JoinAllReduce() {
  Try(module().join_all_reduce(context()), "all-reduce");
  follows_all_reduce_ = true;
}

void DeviceQueue::BeginCapture() {
  Try(module().begin_capture(context()), "begin of a graph");
  known_from_ = launches_;
  capturing_ = true;
  all_reduces_before_ = all_reduces_;
}

DeviceQueue::Graph DeviceQueue::EndCapture() {
  Graph captured;
  captured.all_reduces = all_reduces_ - all_reduces_before_;
  all_reduces_ = all_reduces_before_;
  capturing_ = false;
  Try(module().end_capture(context(), &captured.graph), "end of a graph");
  return captured;
}

void DeviceQueue::Replay(const Graph& graph) {
  Try(module().replay(context(), graph.graph), "graph");
  known_from_ = launches_;
  all_reduces_ += graph.all_reduces;
}

void DeviceQueue::Free(Graph& graph) {
  if (graph.graph != nullptr) module().free_graph(context(), std::exchange(graph.graph, nullptr));
}

}  // namespace dejavu::cuda
