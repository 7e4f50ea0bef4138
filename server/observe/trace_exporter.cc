#include "server/observe/trace_exporter.h"

#include <algorithm>
#include <utility>

#include "grpcpp/create_channel.h"
#include "kernels/base/clock.h"
#include "server/observe/spans.h"
#include "spdlog/spdlog.h"

namespace dejavu {

namespace otlp = opentelemetry::proto::collector::trace::v1;

TraceExporter::TraceExporter(TraceExporterOptions options)
    : options_(std::move(options)), stub_([this] {
        grpc::ChannelArguments arguments;
        arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
        arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 5000);
        return otlp::TraceService::NewStub(
            grpc::CreateCustomChannel(options_.endpoint, grpc::InsecureChannelCredentials(), arguments));
      }()) {
  thread_ = std::thread([this] { Run(); });
}

TraceExporter::~TraceExporter() { Stop(); }

void TraceExporter::OnRequestEnd(const RequestRecord& record) {
  if (!record.trace.sampled) return;
  const int spans = SpanCount(record);
  MutexLock lock(mutex_);
  if (stopping_ || queued_spans_ + spans > options_.max_queue) {
    dropped_ += spans;
    return;
  }
  queued_spans_ += spans;
  queue_.push_back(record);
  queue_.back().prompt_text.clear();
  if (queue_.size() == 1 || queued_spans_ >= options_.max_batch) work_.NotifyOne();
}

void TraceExporter::Stop() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    if (sending_ != nullptr) sending_->TryCancel();
    work_.NotifyOne();
  }
  thread_.join();
  if (exported_ + dropped_ > 0) {
    spdlog::info("traces: {} spans went to {}, {} were dropped", exported_.load(), options_.endpoint, dropped_.load());
  }
}

void TraceExporter::Run() {
  while (true) {
    std::deque<RequestRecord> batch;
    std::chrono::milliseconds timeout = options_.export_timeout;
    bool last = false;
    {
      MutexLock lock(mutex_);
      while (queue_.empty() && !stopping_) work_.Wait(mutex_);
      const SteadyTime deadline = std::chrono::steady_clock::now() + options_.batch_delay;
      while (queued_spans_ < options_.max_batch && !stopping_ && work_.WaitUntil(mutex_, deadline)) {
      }
      last = stopping_;
      if (last) timeout = options_.last_timeout;
      int64_t spans = 0;
      while (!queue_.empty() && (spans < options_.max_batch || last)) {
        spans += SpanCount(queue_.front());
        batch.push_back(std::move(queue_.front()));
        queue_.pop_front();
      }
      queued_spans_ -= spans;
    }
    if (!batch.empty()) Send(batch, timeout);
    if (last) return;
  }
}

void TraceExporter::Send(const std::deque<RequestRecord>& records, std::chrono::milliseconds timeout) {
  otlp::ExportTraceServiceRequest request;
  otlp::ResourceSpans* resource = request.add_resource_spans();
  const auto describe = [&](const char* key, const std::string& value) {
    otlp::KeyValue* attribute = resource->mutable_resource()->add_attributes();
    attribute->set_key(key);
    attribute->mutable_value()->set_string_value(value);
  };
  describe("service.name", "dejavud");
  describe("service.version", options_.version);
  otlp::ScopeSpans* const spans = resource->add_scope_spans();
  spans->mutable_scope()->set_name("dejavud");
  spans->mutable_scope()->set_version(options_.version);
  const TraceClock clock;
  for (const RequestRecord& record : records) AppendSpans(record, options_.model, clock, spans);

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + timeout);
  {
    MutexLock lock(mutex_);
    if (stopping_ && timeout == options_.export_timeout) context.TryCancel();  // Stop did not see it
    sending_ = &context;
  }
  otlp::ExportTraceServiceResponse response;
  const grpc::Status status = stub_->Export(&context, request, &response);
  {
    MutexLock lock(mutex_);
    sending_ = nullptr;
  }
  const int64_t refused = status.ok()
                              ? std::clamp<int64_t>(response.partial_success().rejected_spans(), 0, spans->spans_size())
                              : spans->spans_size();
  dropped_ += refused;
  exported_ += spans->spans_size() - refused;
  if (!status.ok()) {
    spdlog::warn("traces: the collector at {} took no spans: {}", options_.endpoint,
                 std::string(CodeName(status.error_code())));
  } else if (refused > 0) {
    spdlog::warn("traces: the collector at {} refused spans", options_.endpoint);
  }
}

}  // namespace dejavu
