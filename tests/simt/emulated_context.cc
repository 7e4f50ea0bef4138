#include "emulated_context.h"

#include <algorithm>
#include <utility>

#include "kernels/base/status_macros.h"

namespace dejavu::simt {

Mutex emulation_mutex;

namespace {

// Of device memory, for what a launch may not change before its GridWait. Tensors of tests of ops fit.
constexpr int64_t kWatchedBytes = 256 << 10;

}  // namespace

absl::Status RunHeld(DejavuCudaContext* context) {
  if (context->held.empty() || !context->failure.ok()) return context->failure;
  const auto launches = std::exchange(context->held, {});
  std::vector<Memory> watched;
  int64_t bytes = 0;
  for (const auto& [begin, size] : context->device) {
    if (bytes + size > kWatchedBytes) continue;
    watched.emplace_back(begin, size);
    bytes += size;
  }
  return context->failure = Run(launches, watched);
}

absl::Status Arrive(DejavuCudaContext* context, size_t fetched, size_t uploaded) {
  RETURN_IF_ERROR(RunHeld(context));
  for (; context->fetched_before < fetched; ++context->fetched_before) {
    std::ranges::copy(context->fetched.front().bytes, context->fetched.front().host);
    context->fetched.pop_front();
  }
  for (; context->uploaded_before < uploaded; ++context->uploaded_before) {
    const auto row = std::move(context->uploaded.front());
    context->uploaded.pop_front();
    if (!std::equal(row.bytes.begin(), row.bytes.end(), row.host)) {
      return Refuse("pinned memory was changed while an upload from it was under way");
    }
  }
  return context->failure;
}

absl::Status Wait(DejavuCudaContext* context) {
  RETURN_IF_ERROR(RunHeld(context));
  return Arrive(context, context->fetched_before + context->fetched.size(),
                context->uploaded_before + context->uploaded.size());
}

absl::Status CheckNothingAside(const DejavuCudaContext* context, const char* what) {
  return context->aside == nullptr ? absl::OkStatus() : Refuse(what, " before join_all_reduce");
}

absl::Status CheckNoCapture(const DejavuCudaContext* context, const char* what) {
  RETURN_IF_ERROR(CheckNothingAside(context, what));
  return context->capture == nullptr ? context->failure : Refuse(what, " during a capture");
}

absl::Status Submit(DejavuCudaContext* context, Work work) {
  RETURN_IF_ERROR(context->failure);
  if (context->capture == nullptr) return work();
  context->capture->work.push_back(std::move(work));
  return absl::OkStatus();
}

}  // namespace dejavu::simt
