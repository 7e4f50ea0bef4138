#include "server/rpc/call_ends.h"

namespace dejavu {

void CallEnds::Expect() {
  MutexLock lock(mutex_);
  ++expected_;
}

bool CallEnds::Post(std::shared_ptr<WriterTask> task) {
  MutexLock lock(mutex_);
  if (writer_ == nullptr) return false;
  writer_->Post(std::move(task));
  return true;
}

void CallEnds::ReportLate(const RequestRecord& record) {
  MutexLock lock(mutex_);
  if (writer_ == nullptr) return;
  Report(record);
  if (--expected_ == 0) idle_.NotifyAll();
}

void CallEnds::Close(SteadyTime deadline) {
  MutexLock lock(mutex_);
  while (expected_ > 0 && idle_.WaitUntil(mutex_, deadline)) {
  }
  writer_ = nullptr;
}

}  // namespace dejavu
