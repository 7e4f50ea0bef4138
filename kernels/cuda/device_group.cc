#include "kernels/cuda/device_group.h"

#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/group/agree.h"

namespace dejavu::cuda {
namespace {

constexpr double kJoinLimitS = 120;  // for NCCL to find all ranks, which are known to be there
constexpr int64_t kMostGap = 32;     // floats between rows that lie in memory of their own (kernels/layout.h)

class DeviceGroup final : public Communicator {
 public:
  DeviceGroup(DeviceQueue& queue, HeldOps& held, Recordings& recordings, std::unique_ptr<Communicator> host)
      : queue_(queue), held_(held), recordings_(recordings), host_(std::move(host)) {}
  ~DeviceGroup() override {
    recordings_.ForgetGraphs();
    queue_.module().leave_group(queue_.context());
  }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  void AllReduce(Tensor x) override { Queue(x, /*aside=*/false); }
  void AllReduceBeside(Tensor x, absl::FunctionRef<void()> work) override {
    if (!Queue(x, /*aside=*/true)) return work();
    work();
    held_.Flush();
    queue_.JoinAllReduce();
  }
  void Broadcast(void* data, int64_t bytes) override { host_->Broadcast(data, bytes); }
  void Gather(void* all, const void* mine, int64_t bytes) override { host_->Gather(all, mine, bytes); }
  void SetLimit(double seconds) override {
    host_->SetLimit(seconds);
    queue_.Try(queue_.module().limit_group(queue_.context(), seconds), "limit of the group");
  }
  CommunicatorStats stats() const override { return {.all_reduces = queue_.all_reduces()}; }

 private:
  // What lies between the rows of x is added up with them: nobody reads it, and one span is faster than many. False:
  // there is nothing to add up.
  bool Queue(Tensor x, bool aside) {
    CHECK(x.dtype == DType::kFloat32) << Name(x.dtype);
    CHECK(x.rows <= 1 || x.stride - x.cols <= kMostGap) << "AllReduce of columns of something wider";
    held_.Flush();
    if (x.rows == 0 || x.cols == 0) return false;
    queue_.AllReduce(static_cast<float*>(x.data), (x.rows - 1) * x.stride + x.cols, aside);
    return true;
  }

  DeviceQueue& queue_;
  HeldOps& held_;
  Recordings& recordings_;
  const std::unique_ptr<Communicator> host_;
};

// Rank 0's id for the group.
struct GroupId {
  char bytes[DEJAVU_CUDA_GROUP_ID_BYTES] = {};
};

// Whether all ranks can go on.
absl::Status AllGoOn(Communicator& host, const absl::Status& mine, GroupId* id) {
  return Agree(host, mine, id, [](int, const absl::Status& said, const GroupId&) { return said; });
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> JoinDeviceGroup(DeviceQueue& queue, HeldOps& held, Recordings& recordings,
                                                              std::unique_ptr<Communicator> host) {
  if (host->size() == 1) return host;
  const DejavuCudaModule& module = queue.module();
  const auto status_of = [&](int result) {
    return result == 0 ? absl::OkStatus() : absl::UnavailableError(absl::StrCat("cuda: ", module.error()));
  };
  GroupId id;
  RETURN_IF_ERROR(AllGoOn(*host, status_of(module.group_id(host->rank() == 0 ? id.bytes : nullptr)), &id));
  int64_t free_bytes = 0;
  const absl::Status joined =
      status_of(module.join_group(queue.context(), id.bytes, host->rank(), host->size(), kJoinLimitS, &free_bytes));
  auto group = std::make_unique<DeviceGroup>(queue, held, recordings, std::move(host));
  RETURN_IF_ERROR(AllGoOn(*group, joined, &id));
  queue.SetFreeBytes(free_bytes);
  return group;
}

}  // namespace dejavu::cuda
