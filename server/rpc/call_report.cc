#include "server/rpc/call_report.h"

namespace dejavu {

void CallReport::EndCall(grpc::StatusCode code, SteadyTime::duration client_stall,
                         std::shared_ptr<RecordSource> source) {
  {
    MutexLock lock(mutex_);
    source_ = std::move(source);
    record_.code = code;
    record_.client_stall_seconds = std::chrono::duration<double>(client_stall).count();
  }
  Report();
}

std::shared_ptr<CallReport> CallReport::OfRequest(SteadyTime arrival) const {
  auto report = std::make_shared<CallReport>(ends_, record_);
  report->record_.arrival = arrival;
  return report;
}

void CallReport::Wake() {
  std::shared_ptr<RecordSource> lost;  // what it holds may hold this object: it goes after the lock
  MutexLock lock(mutex_);
  if (queued_ || source_ == nullptr) return;
  queued_ = true;
  if (!ends_->Post(shared_from_this())) lost = std::move(source_);  // the server is gone, and nobody listens
}

void CallReport::RunInWriter() {
  {
    MutexLock lock(mutex_);
    queued_ = false;
  }
  Report();
}

void CallReport::Report() {
  std::shared_ptr<RecordSource> source;
  bool expected = false;
  {
    MutexLock lock(mutex_);
    if (reported_) return;
    if (source_ != nullptr && !source_->Fill(&record_)) {
      if (!expected_) ends_->Expect();
      expected_ = true;
      return;
    }
    source = std::move(source_);
    expected = expected_;
    reported_ = true;
  }
  record_.ended = std::chrono::steady_clock::now();
  if (expected) {
    ends_->ReportLate(record_);
  } else {
    ends_->Report(record_);
  }
}

}  // namespace dejavu
