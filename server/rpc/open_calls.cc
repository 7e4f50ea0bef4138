#include "server/rpc/open_calls.h"

#include <vector>

#include "server/rpc/rpc.h"

namespace dejavu {
namespace {

SteadyTime::duration Timeout(double seconds) { return seconds > 0 ? Lasting(seconds) : SteadyTime::duration::max(); }

}  // namespace

CallTimeouts::CallTimeouts(const ServerOptions& options)
    : request(Timeout(options.request_timeout_s)), stall(Timeout(options.stall_timeout_s)) {}

void OpenCalls::Add(const std::shared_ptr<Rpc>& rpc) {
  MutexLock lock(mutex_);
  calls_[rpc.get()] = rpc;
}

void OpenCalls::Remove(const Rpc* rpc) {
  MutexLock lock(mutex_);
  calls_.erase(rpc);
}

void OpenCalls::Sweep(SteadyTime now) {
  for (const std::shared_ptr<Rpc>& rpc : All()) rpc->EndIfWaiting(now, timeouts_);
}

void OpenCalls::EndReading(const absl::Status& status) {
  for (const std::shared_ptr<Rpc>& rpc : All()) rpc->EndIfReading(status);
}

std::vector<std::shared_ptr<Rpc>> OpenCalls::All() const {
  std::vector<std::shared_ptr<Rpc>> calls;
  {
    MutexLock lock(mutex_);
    calls.reserve(calls_.size());
    for (const auto& [raw, weak] : calls_) {
      if (std::shared_ptr<Rpc> rpc = weak.lock()) calls.push_back(std::move(rpc));
    }
  }
  return calls;
}

}  // namespace dejavu
