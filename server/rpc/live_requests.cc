#include "server/rpc/live_requests.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/rpc/error_details.h"

namespace dejavu {

void LiveRequests::Enter() {
  MutexLock lock(mutex_);
  ++calls_;
}

void LiveRequests::Done() {
  MutexLock lock(mutex_);
  if (--calls_ == 0) idle_.NotifyAll();
}

absl::Status LiveRequests::Add(const RequestKey& key, const std::string& tenant, LiveRequest* request,
                               std::function<void()> freed) {
  MutexLock lock(mutex_);
  const auto [entry, fresh] = requests_.try_emplace(key, Entry{tenant, request, {}});
  if (fresh) return absl::OkStatus();
  std::vector<Waiter>& waiters = entry->second.waiters;
  const bool waits =
      std::any_of(waiters.begin(), waiters.end(), [&](const Waiter& waiter) { return waiter.request == request; });
  if (!waits) waiters.push_back({request, std::move(freed)});
  return WithErrorInfo(
      absl::AlreadyExistsError(absl::StrCat("a request with the id ", Printable(key.id, 128), " is under way")),
      "DUPLICATE_REQUEST_ID");
}

void LiveRequests::Remove(const RequestKey& key, const LiveRequest* request) {
  std::vector<Waiter> waiters;
  {
    MutexLock lock(mutex_);
    const auto found = requests_.find(key);
    if (found == requests_.end()) return;
    if (found->second.request != request) {
      auto& all = found->second.waiters;
      const auto own = [&](const Waiter& waiter) { return waiter.request == request; };
      all.erase(std::remove_if(all.begin(), all.end(), own), all.end());
      return;
    }
    waiters = std::move(found->second.waiters);
    requests_.erase(found);
  }
  for (const Waiter& waiter : waiters) waiter.freed();
}

bool LiveRequests::Stop(const RequestKey& key, const absl::Status& reason) {
  MutexLock lock(mutex_);
  const auto found = requests_.find(key);
  if (found == requests_.end()) return false;
  found->second.request->Stop(reason);
  return true;
}

absl::StatusOr<bool> LiveRequests::StopOfAny(const std::string& id, const std::optional<std::string>& tenant,
                                             const absl::Status& reason) {
  MutexLock lock(mutex_);
  std::vector<const Entry*> found;
  for (const auto& [key, entry] : requests_) {
    if (key.id == id && (!tenant.has_value() || *tenant == entry.tenant)) found.push_back(&entry);
  }
  if (found.size() > 1) {
    return WithErrorInfo(
        absl::FailedPreconditionError(absl::StrCat(found.size(), " tenants have a request with the id ",
                                                   Printable(id, 128), ": name the tenant")),
        "AMBIGUOUS_REQUEST_ID");
  }
  if (found.empty()) return false;
  found[0]->request->Stop(reason);
  return true;
}

void LiveRequests::StopAll(const absl::Status& reason) {
  std::vector<Waiter> waiters;
  {
    MutexLock lock(mutex_);
    for (const auto& [key, entry] : requests_) {
      entry.request->Stop(reason);
      waiters.insert(waiters.end(), entry.waiters.begin(), entry.waiters.end());
    }
  }
  for (const Waiter& waiter : waiters) waiter.freed();
}

std::vector<LiveRequests::Live> LiveRequests::List(size_t limit) {
  MutexLock lock(mutex_);
  std::vector<Live> live;
  for (const auto& [key, entry] : requests_) {
    if (live.size() == limit) break;
    live.push_back({entry.tenant, key.id});
  }
  return live;
}

bool LiveRequests::idle() {
  MutexLock lock(mutex_);
  return calls_ == 0;
}

bool LiveRequests::WaitIdle(SteadyTime deadline) {
  MutexLock lock(mutex_);
  while (calls_ > 0) {
    if (!idle_.WaitUntil(mutex_, deadline)) return calls_ == 0;
  }
  return true;
}

}  // namespace dejavu
