// Small arrays follow each other in a ring of pinned memory, which is free again up to the last mark that was awaited.
// Large ones go piece by piece through the two parts of it in turn: one is filled while the other is read.
#include "kernels/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/round.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kStagingBytes = 4 << 20;  // of each of the two parts of pinned memory
constexpr int64_t kSmallUpload = 1 << 20;   // bytes: returns without waiting for the device
constexpr int64_t kAlignment = 16;

}  // namespace

absl::StatusOr<std::unique_ptr<Staging>> Staging::Create(DeviceQueue& queue) {
  void* memory = nullptr;
  if (queue.module().allocate_pinned(queue.context(), 2 * kStagingBytes, &memory) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("cuda: ", queue.module().error()));
  }
  return std::unique_ptr<Staging>(new Staging(queue, static_cast<char*>(memory)));
}

Staging::~Staging() { queue_.module().free_pinned(queue_.context(), memory_); }

void Staging::Wait() {
  queue_.Try(queue_.module().synchronize(queue_.context()), "synchronize");
  Fill(filled_ + static_cast<int64_t>(fetched_.size()));
  taken_ = released_ = 0;
  taken_at_ = {};
}

// The first `count` downloads since the beginning have arrived.
void Staging::Fill(int64_t count) {
  for (; filled_ < count; ++filled_) {
    const Fetched& fetched = fetched_.front();
    std::memcpy(fetched.target, fetched.place, fetched.bytes);
    fetched_.pop_front();
  }
}

uint64_t Staging::Mark() {
  ++marks_;
  fetched_at_[marks_ % kMarks] = filled_ + static_cast<int64_t>(fetched_.size());
  taken_at_[marks_ % kMarks] = taken_;
  queue_.Try(queue_.module().stamp(queue_.context(), EventOf(marks_)), "mark");
  return marks_;
}

void Staging::Await(uint64_t mark) {
  CHECK(mark <= marks_ && mark + kMarks > marks_) << "mark " << mark << " of " << marks_;
  queue_.Try(queue_.module().wait(queue_.context(), EventOf(mark)), "wait");
  Fill(fetched_at_[mark % kMarks]);
  released_ = std::max(released_, taken_at_[mark % kMarks]);
}

// Pinned memory until the next Wait, or the next Await of a mark that comes after this.
char* Staging::Take(int64_t bytes) {
  constexpr int64_t kAll = 2 * kStagingBytes;
  if (taken_ % kAll + bytes > kAll) taken_ = RoundUp(taken_, kAll);  // a place does not go over the end
  if (taken_ + bytes > released_ + kAll) Wait();
  char* place = memory_ + taken_ % kAll;
  taken_ += RoundUp(bytes, kAlignment);
  return place;
}

void Staging::Send(char* to, int64_t to_stride, const char* from, int64_t row_bytes, int64_t rows) {
  const DejavuCudaUpload upload = {
      {.to = to, .to_stride = to_stride, .from = from, .from_stride = row_bytes, .row_bytes = row_bytes, .rows = rows}};
  queue_.Try(queue_.module().upload(queue_.context(), upload), "upload");
}

void Staging::Upload(Tensor target, const void* source) {
  CHECK(!queue_.capturing()) << "upload while ops are recorded";
  const int64_t bytes = target.bytes();
  if (bytes == 0) return;
  if (bytes > kSmallUpload) return UploadLarge(target, static_cast<const char*>(source));
  const int64_t element = SizeOf(target.dtype);
  char* place = Take(bytes);
  std::memcpy(place, source, bytes);
  Send(static_cast<char*>(target.data), target.stride * element, place, target.cols * element, target.rows);
}

void Staging::UploadLarge(Tensor target, const char* source) {
  Wait();
  const int64_t row_bytes = target.cols * SizeOf(target.dtype), stride_bytes = target.stride * SizeOf(target.dtype);
  const int64_t piece_rows = std::max<int64_t>(1, kStagingBytes / row_bytes);
  const int64_t piece_bytes = std::min(row_bytes, kStagingBytes);
  int part = 0;
  for (int64_t r = 0; r < target.rows; r += piece_rows) {
    const int64_t rows = std::min(piece_rows, target.rows - r);
    for (int64_t at = 0; at < row_bytes; at += piece_bytes, part = 1 - part) {
      const int64_t bytes = std::min(piece_bytes, row_bytes - at);
      char* place = memory_ + part * kStagingBytes;
      std::memcpy(place, source + r * row_bytes + at, rows * bytes);
      Wait();  // for the piece before this one
      Send(static_cast<char*>(target.data) + r * stride_bytes + at, stride_bytes, place, bytes, rows);
    }
  }
  taken_ = 2 * kStagingBytes;  // the last pieces are still on their way
}

void Staging::Download(void* target, Tensor source) {
  CHECK(!queue_.capturing()) << "download while ops are recorded";
  const int64_t bytes = source.bytes(), element = SizeOf(source.dtype);
  if (bytes == 0) return;
  DejavuCudaCopy copy = {.to = target,
                         .to_stride = source.cols * element,
                         .from = source.data,
                         .from_stride = source.stride * element,
                         .row_bytes = source.cols * element,
                         .rows = source.rows};
  if (bytes > kStagingBytes) {
    queue_.Try(queue_.module().download(queue_.context(), {copy}), "download");
    return;
  }
  copy.to = Take(bytes);
  queue_.Try(queue_.module().fetch(queue_.context(), {copy}), "download");
  fetched_.push_back({target, copy.to, bytes});
}

}  // namespace dejavu::cuda
