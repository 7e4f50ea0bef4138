#include "server/rpc/live_requests.h"

#include "absl/strings/str_cat.h"
#include "server/rpc/error_details.h"

namespace dejavu {

absl::Status LiveRequests::Add(const std::string& id, const std::string& tenant, LiveRequest* request) {
  MutexLock lock(mutex_);
  if (!requests_.emplace(id, Entry{tenant, request}).second) {
    return WithErrorInfo(
        absl::AlreadyExistsError(absl::StrCat("a request with the id ", Printable(id, 128), " is under way")),
        "DUPLICATE_REQUEST_ID");
  }
  ++calls_;
  return absl::OkStatus();
}

void LiveRequests::Remove(const std::string& id) {
  MutexLock lock(mutex_);
  requests_.erase(id);
}

void LiveRequests::Done() {
  MutexLock lock(mutex_);
  if (--calls_ == 0) idle_.NotifyAll();
}

absl::StatusOr<bool> LiveRequests::Stop(const std::string& id, const std::optional<std::string>& tenant,
                                        const absl::Status& reason) {
  MutexLock lock(mutex_);
  const auto found = requests_.find(id);
  if (found == requests_.end()) return false;
  if (tenant.has_value() && *tenant != found->second.tenant) {
    return WithErrorInfo(
        absl::PermissionDeniedError(absl::StrCat("the request ", Printable(id, 128), " is another tenant's")),
        "NOT_THE_OWNER");
  }
  found->second.request->Stop(reason);
  return true;
}

void LiveRequests::StopAll(const absl::Status& reason) {
  MutexLock lock(mutex_);
  for (const auto& [id, entry] : requests_) entry.request->Stop(reason);
}

std::vector<std::string> LiveRequests::Ids(size_t limit) {
  MutexLock lock(mutex_);
  std::vector<std::string> ids;
  for (const auto& [id, entry] : requests_) {
    if (ids.size() == limit) break;
    ids.push_back(id);
  }
  return ids;
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
