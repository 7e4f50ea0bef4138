// TraceExporter: sends the spans of sampled calls (server/observe/spans.h) to an OpenTelemetry collector, by OTLP over
// gRPC. A thread of its own sends them in batches. A call only puts its record into a bounded queue, and loses it if
// the queue is full, whatever the collector does. Any thread.
#ifndef SERVER_OBSERVE_TRACE_EXPORTER_H_
#define SERVER_OBSERVE_TRACE_EXPORTER_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <thread>

#include "grpcpp/client_context.h"
#include "kernels/base/mutex.h"
#include "opentelemetry/trace_service.grpc.pb.h"
#include "server/rpc/request_record.h"

namespace dejavu {

struct TraceExporterOptions {
  std::string endpoint;  // host:port, in plain text
  std::string model;     // as requests name it
  std::string version;   // of the daemon
  int max_queue = 4096;  // spans
  int max_batch = 512;   // spans of one Export, more or less
  std::chrono::milliseconds batch_delay{500};
  std::chrono::milliseconds export_timeout{5000};
  std::chrono::milliseconds last_timeout{1000};  // for what is left when it stops
};

class TraceExporter final : public RequestObserver {
 public:
  explicit TraceExporter(TraceExporterOptions options);
  // As Stop.
  ~TraceExporter() override;

  void OnRequestEnd(const RequestRecord& record) override;

  // Sends what is queued within last_timeout, and says in the log what became of all spans. Once.
  void Stop();

  int64_t exported() const { return exported_; }  // spans that the collector took
  int64_t dropped() const { return dropped_; }    // spans that it did not: queue full, no answer, or refused

 private:
  void Run();
  void Send(const std::deque<RequestRecord>& records, std::chrono::milliseconds timeout);

  const TraceExporterOptions options_;
  const std::unique_ptr<opentelemetry::proto::collector::trace::v1::TraceService::Stub> stub_;
  std::atomic<int64_t> exported_{0}, dropped_{0};

  Mutex mutex_;
  CondVar work_;
  std::deque<RequestRecord> queue_ ABSL_GUARDED_BY(mutex_);
  int64_t queued_spans_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ClientContext* sending_ ABSL_GUARDED_BY(mutex_) = nullptr;  // of the Export that is under way

  std::thread thread_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_TRACE_EXPORTER_H_
