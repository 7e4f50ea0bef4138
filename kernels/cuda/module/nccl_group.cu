// Communicators are blocking ones: with those that are not, NCCL starts a thread for every all-reduce that is queued.
// What may wait for other ranks, which is making a communicator and taking it down, runs in a thread of its own, so
// that it can be given up; an all-reduce only queues, for all connections are made at the beginning.
#include "kernels/cuda/module/nccl_group.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "kernels/cuda/abi.h"
#include "kernels/cuda/module/shared_library.h"

#if __has_include(<nccl.h>)
#include <nccl.h>
#endif

namespace dejavu::cuda {
namespace {

// NCCL's interface to C, the same since version 2.0.
using Communicator = void*;
using Result = int;
struct UniqueId {
  char bytes[DEJAVU_CUDA_GROUP_ID_BYTES];
};
constexpr Result kSuccess = 0, kRemoteError = 6;
constexpr int kFloat32 = 7, kSum = 0;
#if __has_include(<nccl.h>)
static_assert(sizeof(ncclUniqueId) == sizeof(UniqueId) && sizeof(ncclComm_t) == sizeof(Communicator));
static_assert(ncclSuccess == kSuccess && ncclRemoteError == kRemoteError);
static_assert(ncclFloat32 == kFloat32 && ncclSum == kSum);
static_assert(sizeof(ncclResult_t) == sizeof(int) && sizeof(ncclDataType_t) == sizeof(int));
#endif

constexpr double kAbortLimitS = 0.5, kLeaveLimitS = 5;  // for a communicator to be taken down

// What holds unless the environment says otherwise.
constexpr const char* kSettings[][2] = {
    {"NCCL_NVLS_ENABLE", "0"},      // sums in switches come in any order: not the same bits in every run
    {"NCCL_RUNTIME_CONNECT", "0"},  // all connections, and their memory, when the group is made
    {"NCCL_GRAPH_REGISTER", "0"},   // a rank may record a step that another one replays
};

struct Nccl {
  SharedLibrary library;
  Result (*get_unique_id)(UniqueId*) = nullptr;
  Result (*init_rank)(Communicator*, int size, UniqueId, int rank) = nullptr;
  Result (*destroy)(Communicator) = nullptr;
  Result (*abort)(Communicator) = nullptr;
  Result (*async_error)(Communicator, Result*) = nullptr;
  Result (*all_reduce)(const void* from, void* to, size_t count, int type, int operation, Communicator,
                       cudaStream_t) = nullptr;
  const char* (*error_string)(Result) = nullptr;
  const char* (*last_error)(Communicator) = nullptr;
};

Nccl LoadNccl() {
  Nccl nccl;
  for (const auto& [name, value] : kSettings) setenv(name, value, /*overwrite=*/0);
  nccl.library.Load({"libnccl.so.2"});
  nccl.library.Resolve("ncclGetUniqueId", &nccl.get_unique_id);
  nccl.library.Resolve("ncclCommInitRank", &nccl.init_rank);
  nccl.library.Resolve("ncclCommDestroy", &nccl.destroy);
  nccl.library.Resolve("ncclCommAbort", &nccl.abort);
  nccl.library.Resolve("ncclCommGetAsyncError", &nccl.async_error);
  nccl.library.Resolve("ncclAllReduce", &nccl.all_reduce);
  nccl.library.Resolve("ncclGetErrorString", &nccl.error_string);
  nccl.library.Resolve("ncclGetLastError", &nccl.last_error);
  return nccl;
}

const Nccl& GetNccl() {
  static const Nccl nccl = LoadNccl();
  return nccl;
}

std::string Describe(Result result, const char* tried) {
  if (result == kSuccess) return "";
  std::string text = std::string(tried) + ": NCCL: " + GetNccl().error_string(result);
  const char* const details = GetNccl().last_error(nullptr);
  if (details != nullptr && details[0] != '\0') text += std::string(": ") + details;
  return text;
}

// Runs `call` in a thread of its own. False: it has not returned in time, and is left to itself.
bool Within(double seconds, std::function<void()> call) {
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool ended = false;
  };
  const auto state = std::make_shared<State>();
  std::thread([state, call = std::move(call)] {
    call();
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->ended = true;
    state->changed.notify_all();
  }).detach();
  std::unique_lock<std::mutex> lock(state->mutex);
  return state->changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return state->ended; });
}

std::string Usable() {
  return GetNccl().library.missing().empty()
             ? ""
             : "groups of GPUs need NCCL, which cannot be used: " + GetNccl().library.missing();
}

}  // namespace

std::string NcclGroup::MakeId(char* id) {
  std::string why = Usable();
  if (!why.empty() || id == nullptr) return why;
  UniqueId made;
  why = Describe(GetNccl().get_unique_id(&made), "making an id for a group");
  if (why.empty()) std::memcpy(id, made.bytes, sizeof(made.bytes));
  return why;
}

std::string NcclGroup::Join(int device, const char* id, int rank, int size, double seconds,
                            std::unique_ptr<NcclGroup>* group) {
  std::string why = Usable();
  if (!why.empty()) return why;
  struct Made {
    Communicator communicator = nullptr;
    std::string why;
  };
  const auto made = std::make_shared<Made>();
  UniqueId unique;
  std::memcpy(unique.bytes, id, sizeof(unique.bytes));
  const bool came = Within(seconds, [=] {
    cudaSetDevice(device);
    made->why = Describe(GetNccl().init_rank(&made->communicator, size, unique, rank), "joining a group");
  });
  if (!came) {
    return "joining a group: the " + std::to_string(size) + " ranks have not found each other within " +
           std::to_string(static_cast<int64_t>(seconds)) + " s; NCCL_DEBUG=INFO tells more";
  }
  if (made->why.empty()) group->reset(new NcclGroup(made->communicator, device, rank, size));
  return made->why;
}

NcclGroup::~NcclGroup() { Leave(); }

std::string NcclGroup::AllReduce(float* data, int64_t count, cudaStream_t stream, bool* peer_lost) {
  const Result result = GetNccl().all_reduce(data, data, count, kFloat32, kSum, communicator_, stream);
  *peer_lost = result == kRemoteError;
  return Describe(result, "all-reduce");
}

std::string NcclGroup::Trouble() {
  if (communicator_ == nullptr) return "the group was left";
  Result result = kSuccess;
  const Result asked = GetNccl().async_error(communicator_, &result);
  return Describe(asked == kSuccess ? result : asked, "a group");
}

void NcclGroup::Abort() {
  if (communicator_ == nullptr) return;
  Within(kAbortLimitS, [device = device_, communicator = std::exchange(communicator_, nullptr)] {
    cudaSetDevice(device);
    GetNccl().abort(communicator);  // first of all ends its kernels; returns when no graph holds one
  });
}

void NcclGroup::Leave() {
  if (communicator_ == nullptr) return;
  Within(kLeaveLimitS, [device = device_, communicator = std::exchange(communicator_, nullptr)] {
    cudaSetDevice(device);
    GetNccl().destroy(communicator);
  });
}

}  // namespace dejavu::cuda
