#include "loadtest/generator/client.h"

#include <algorithm>

#include "grpcpp/alarm.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/client_callback.h"
#include "kernels/base/clock.h"

namespace dejavu {
namespace {

using SteadyClock = std::chrono::steady_clock;

}  // namespace

// Lives from Prepare until OnDone.
class Client::Call final : public grpc::ClientReadReactor<v1::GenerateChunk> {
 public:
  Call(Client* client, v1::GenerationService::Stub* stub, int64_t id, PlannedRequest request)
      : client_(client), stub_(stub), request_(std::move(request)) {
    outcome_.id = id;
    outcome_.kind = request_.kind;
    outcome_.tier = request_.message.sparsity().tier();
    context_.set_wait_for_ready(false);  // a server that is gone is a failure, now
    for (const auto& [key, value] : client->options_.metadata) context_.AddMetadata(key, value);
    if (!request_.tenant.empty()) context_.AddMetadata("x-tenant", request_.tenant);
  }

  void Send(std::optional<SteadyTime> scheduled) {
    const double timeout_s = client_->options_.timeout_s;
    if (timeout_s > 0.0) {
      const auto passed = scheduled ? SteadyClock::now() - *scheduled : SteadyClock::duration::zero();
      context_.set_deadline(
          std::chrono::system_clock::now() +
          std::chrono::duration_cast<std::chrono::system_clock::duration>(Lasting(timeout_s) - passed));
    }
    stub_->async()->GenerateStream(&context_, &request_.message, this);
    // A slow reader's next read comes from a timer.
    if (outcome_.kind == RequestKind::kSlowReader) AddHold();
    StartRead(&chunk_);
    outcome_.sent = SteadyClock::now();
    outcome_.scheduled = scheduled.value_or(outcome_.sent);
    StartCall();
  }

  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    const bool slow = outcome_.kind == RequestKind::kSlowReader;
    if (!ok) {
      if (slow) RemoveHold();
      return;
    }
    Take(SteadyClock::now());
    const bool enough = outcome_.tokens >= static_cast<uint32_t>(client_->options_.cancel_after_tokens);
    if (outcome_.kind == RequestKind::kCancelled && enough) context_.TryCancel();
    if (!slow) {
      StartRead(&chunk_);
      return;
    }
    // A new one each time: the last one's function may not have returned yet.
    alarm_ = std::make_unique<grpc::Alarm>();
    alarm_->Set(std::chrono::system_clock::now() + Lasting(1e-3 * client_->options_.slow_reader_ms),
                [this](bool /*expired*/) { StartRead(&chunk_); });
  }

  void OnDone(const grpc::Status& status) override {
    outcome_.ended = SteadyClock::now();
    outcome_.code = status.error_code();
    Client* const client = client_;
    client->Remove(this);
    const Outcome outcome = std::move(outcome_);
    delete this;
    client->Ended(outcome);
  }

 private:
  void Take(SteadyTime now) {
    if (chunk_.has_prompt()) {
      outcome_.prompt_tokens = chunk_.prompt().prompt_tokens();
      outcome_.tier = chunk_.prompt().tier();
    }
    for (int i = 0; i < chunk_.token_ids_size(); ++i) {
      if (outcome_.tokens++ == 0) {
        outcome_.first_token = now;
      } else {
        outcome_.gaps_ms.push_back(std::chrono::duration<float, std::milli>(now - outcome_.last_token).count());
      }
      outcome_.last_token = now;
    }
    if (!chunk_.has_finish()) return;
    outcome_.finish = chunk_.finish().reason();
    if (chunk_.finish().sparsity().decode_tokens() > 0) {
      outcome_.density = static_cast<float>(chunk_.finish().sparsity().mlp_density());
    }
  }

  Client* const client_;
  v1::GenerationService::Stub* const stub_;
  const PlannedRequest request_;
  grpc::ClientContext context_;
  v1::GenerateChunk chunk_;
  std::unique_ptr<grpc::Alarm> alarm_;
  Outcome outcome_;
};

Client::Client(const std::vector<std::shared_ptr<grpc::Channel>>& channels, ClientOptions options, OnEnd on_end)
    : options_(std::move(options)), on_end_(std::move(on_end)) {
  for (const auto& channel : channels) stubs_.push_back(v1::GenerationService::NewStub(channel));
}

Client::~Client() { WaitUntilAtMost(0, SteadyTime::max()); }

void Client::DeleteCall::operator()(Call* call) const { delete call; }

Client::CallPtr Client::Prepare(int64_t id, PlannedRequest request) {
  return CallPtr(new Call(this, stubs_[next_stub_++ % stubs_.size()].get(), id, std::move(request)));
}

void Client::Send(CallPtr call, std::optional<SteadyTime> scheduled) {
  {
    const MutexLock lock(mutex_);
    ++in_flight_;
    calls_.insert(call.get());
  }
  call.release()->Send(scheduled);  // from here on it belongs to gRPC, until OnDone
}

int Client::in_flight() {
  const MutexLock lock(mutex_);
  return in_flight_;
}

bool Client::WaitUntilAtMost(int most, SteadyTime deadline) {
  const MutexLock lock(mutex_);
  while (in_flight_ > most) {
    // The clock's last moment is beyond what waits can express.
    if (deadline == SteadyTime::max()) {
      changed_.Wait(mutex_);
    } else if (!changed_.WaitUntil(mutex_, deadline)) {
      return in_flight_ <= most;
    }
  }
  return true;
}

// The lock keeps the calls alive; what gRPC makes of it comes from its own threads.
void Client::CancelAll() {
  const MutexLock lock(mutex_);
  for (Call* call : calls_) call->Cancel();
}

void Client::Remove(Call* call) {
  const MutexLock lock(mutex_);
  calls_.erase(call);
}

void Client::Ended(const Outcome& outcome) {
  on_end_(outcome);
  const MutexLock lock(mutex_);
  --in_flight_;
  changed_.NotifyAll();
}

}  // namespace dejavu
