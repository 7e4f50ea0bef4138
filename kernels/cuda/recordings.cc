#include "kernels/cuda/recordings.h"

#include <cstddef>
#include <utility>

#include "kernels/backend.h"
#include "kernels/base/check.h"

namespace dejavu::cuda {
namespace {

constexpr size_t kMostRecordings = 128;

}  // namespace

void Recordings::Run(uint64_t key, absl::FunctionRef<void()> ops) {
  CHECK(!queue_.capturing()) << "a recording within a recording";
  if (key == Backend::kOnce) return ops();
  if (recordings_.size() == kMostRecordings && recordings_.find(key) == recordings_.end()) {
    staging_.Wait();
    ForgetGraphs();  // shapes of steps that have not come for long; the others are recorded again
    recordings_.clear();
  }
  Recording& recording = recordings_[key];
  if (!std::exchange(recording.seen, true)) return ops();
  if (recording.graph.graph == nullptr && !recording.refused) Record(recording, ops);
  if (recording.refused) return ops();
  queue_.Replay(recording.graph);
}

void Recordings::Record(Recording& recording, absl::FunctionRef<void()> ops) {
  queue_.BeginCapture();
  ops();
  recording.graph = queue_.EndCapture();
  recording.refused = recording.graph.graph == nullptr;
}

void Recordings::ForgetGraphs() {
  for (auto& [key, recording] : recordings_) queue_.Free(recording.graph);
}

}  // namespace dejavu::cuda
