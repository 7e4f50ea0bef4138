#include "emulated_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "absl/status/statusor.h"
#include "emulated_module.h"
#include "kernels/base/status_macros.h"

namespace dejavu::simt {
namespace {

absl::Status AllocateIn(Allocations& blocks, int64_t bytes, int fill, void** memory) {
  if (posix_memalign(memory, 256, bytes) != 0) return Refuse("no host memory for ", bytes, " bytes");
  std::memset(*memory, fill, bytes);
  blocks[static_cast<char*>(*memory)] = bytes;
  return absl::OkStatus();
}

// Returns how many bytes were there.
absl::StatusOr<int64_t> FreeFrom(Allocations& blocks, void* memory) {
  const auto block = blocks.find(static_cast<char*>(memory));
  if (block == blocks.end()) return Refuse("freed memory that was not allocated");
  std::free(memory);
  return blocks.extract(block).mapped();
}

// The rows of a copy.
class Rows {
 public:
  explicit Rows(const DejavuCudaCopy& copy) : copy_(copy) {}

  bool empty() const { return copy_.row_bytes <= 0 || copy_.rows <= 0; }
  bool WritesTo(const Allocations& memory) const { return Within(memory, copy_.to, Bytes(copy_.to_stride)); }
  bool ReadsFrom(const Allocations& memory) const { return Within(memory, copy_.from, Bytes(copy_.from_stride)); }

  // function(to, from, bytes)
  template <typename Function>
  void ForEach(const Function& function) const {
    for (int64_t row = 0; row < copy_.rows; ++row) {
      function(static_cast<char*>(copy_.to) + row * copy_.to_stride,
               static_cast<const char*>(copy_.from) + row * copy_.from_stride, copy_.row_bytes);
    }
  }

 private:
  int64_t Bytes(int64_t stride) const { return (copy_.rows - 1) * stride + copy_.row_bytes; }

  const DejavuCudaCopy copy_;
};

}  // namespace

bool Within(const Allocations& memory, const void* begin, int64_t bytes) {
  const char* const first = static_cast<const char*>(begin);
  auto block = memory.upper_bound(first);
  if (block == memory.begin()) return false;
  --block;
  return first + bytes <= block->first + block->second;
}

absl::Status Allocate(DejavuCudaContext* context, int64_t bytes, void** memory) {
  RETURN_IF_ERROR(CheckNoCapture(context, "allocate"));
  const int64_t free_bytes = GetEmulation().memory_bytes - context->device_bytes;
  if (bytes > free_bytes) return Refuse("out of memory: ", bytes, " bytes asked for, ", free_bytes, " free");
  RETURN_IF_ERROR(AllocateIn(context->device, bytes, 0, memory));
  context->device_bytes += bytes;
  return absl::OkStatus();
}

absl::Status Free(DejavuCudaContext* context, void* memory) {
  RunHeld(context).IgnoreError();  // a later call tells
  ASSIGN_OR_RETURN(const int64_t bytes, FreeFrom(context->device, memory));
  context->device_bytes -= bytes;
  return absl::OkStatus();
}

absl::Status AllocatePinned(DejavuCudaContext* context, int64_t bytes, void** memory) {
  RETURN_IF_ERROR(CheckNoCapture(context, "allocate_pinned"));
  return AllocateIn(context->pinned, bytes, 0xFF, memory);
}

absl::Status FreePinned(DejavuCudaContext* context, void* memory) {
  const absl::Status waited = Wait(context);  // for copies that may use it
  RETURN_IF_ERROR(FreeFrom(context->pinned, memory).status());
  return waited;
}

absl::Status Upload(DejavuCudaContext* context, DejavuCudaUpload upload) {
  const Rows rows(upload.copy);
  if (rows.empty()) return absl::OkStatus();
  if (!rows.WritesTo(context->device)) return Refuse("upload: the target is not device memory");
  const bool pinned = rows.ReadsFrom(context->pinned);
  if (!pinned) RETURN_IF_ERROR(CheckNoCapture(context, "upload of pageable memory"));
  ++GetEmulation().uploads;
  return Submit(context, [=] {
    RETURN_IF_ERROR(RunHeld(context));
    rows.ForEach([&](char* to, const char* from, int64_t bytes) {
      std::copy_n(from, bytes, to);
      if (pinned) context->uploaded.push_back({const_cast<char*>(from), std::vector<char>(from, from + bytes)});
    });
    return absl::OkStatus();
  });
}

absl::Status Download(DejavuCudaContext* context, DejavuCudaDownload download) {
  const Rows rows(download.copy);
  if (rows.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(CheckNoCapture(context, "download"));
  if (!rows.ReadsFrom(context->device)) return Refuse("download: the source is not device memory");
  RETURN_IF_ERROR(Wait(context));
  rows.ForEach([](char* to, const char* from, int64_t bytes) { std::copy_n(from, bytes, to); });
  return absl::OkStatus();
}

absl::Status Fetch(DejavuCudaContext* context, DejavuCudaFetch fetch) {
  const Rows rows(fetch.copy);
  if (rows.empty()) return absl::OkStatus();
  if (!rows.ReadsFrom(context->device)) return Refuse("fetch: the source is not device memory");
  if (!rows.WritesTo(context->pinned)) return Download(context, {fetch.copy});
  ++GetEmulation().fetches;
  GetEmulation().fetched_bytes += fetch.copy.row_bytes * fetch.copy.rows;
  return Submit(context, [=] {
    RETURN_IF_ERROR(RunHeld(context));
    rows.ForEach([&](char* to, const char* from, int64_t bytes) {
      context->fetched.push_back({to, std::vector<char>(from, from + bytes)});
      std::fill_n(to, bytes, '\xFF');
    });
    return absl::OkStatus();
  });
}

}  // namespace dejavu::simt
