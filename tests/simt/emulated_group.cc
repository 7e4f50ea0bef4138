#include "emulated_group.h"

#include <algorithm>
#include <functional>
#include <map>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"

namespace dejavu::simt {

std::shared_ptr<EmulatedGroup> EmulatedGroup::Of(const std::string& id) {
  static Mutex mutex;
  static std::map<std::string, std::weak_ptr<EmulatedGroup>> groups;
  MutexLock lock(mutex);
  std::shared_ptr<EmulatedGroup> group = groups[id].lock();
  if (group == nullptr) groups[id] = group = std::make_shared<EmulatedGroup>();
  return group;
}

absl::Status EmulatedGroup::Join(int32_t device, int32_t rank, int32_t size, double seconds) {
  MutexLock lock(mutex_);
  if (!devices_.insert(device).second) {
    return absl::FailedPreconditionError(absl::StrCat("rank ", rank, ": another rank has device ", device));
  }
  parts_.resize(size);
  changed_.NotifyAll();
  return Wait(seconds, [&] { return std::ssize(devices_) == size; });
}

absl::Status EmulatedGroup::AllReduce(int32_t rank, float* data, int64_t count, double seconds) {
  MutexLock lock(mutex_);
  const int64_t before = done_;
  parts_[rank].assign(data, data + count);
  if (++come_ == parts_.size()) {
    sum_ = parts_[0];
    for (size_t i = 1; i < parts_.size(); ++i) {
      CHECK(parts_[i].size() == sum_.size()) << "ranks add up " << sum_.size() << " and " << parts_[i].size();
      std::ranges::transform(sum_, parts_[i], sum_.begin(), std::plus<>());
    }
    come_ = 0;
    ++done_;
    changed_.NotifyAll();
  }
  RETURN_IF_ERROR(Wait(seconds, [&] { return done_ > before; }));
  std::ranges::copy(sum_, data);  // the next one is not done before this rank has come to it
  return absl::OkStatus();
}

absl::Status EmulatedGroup::Wait(double seconds, absl::FunctionRef<bool()> come) {
  using Clock = std::chrono::steady_clock;
  const SteadyTime deadline =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(seconds, 1e6)));
  while (!come()) {
    if (!changed_.WaitUntil(mutex_, deadline) && !come()) {
      return absl::DeadlineExceededError(absl::StrCat("a rank did not come within ", seconds, " s"));
    }
  }
  return absl::OkStatus();
}

}  // namespace dejavu::simt
