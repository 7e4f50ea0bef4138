#include "server/rpc/call_slot.h"

#include <chrono>

#include "absl/strings/str_cat.h"
#include "server/rpc/compression.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

// Replies up to that size, such as tokens and errors, may go twice as far: a client that reads its other replies slowly
// shall not lose its streams.
constexpr int64_t kSmallReplyBytes = 64 << 10;
constexpr std::chrono::seconds kRetry(1);
// Clients whose deadlines pass are no attackers, unless there is no end of them.
constexpr double kDeadlineCancels = 0.1;
// Of calls whose connection has gone before they were seen nobody hears any more; a flood of them must cost little.
constexpr int kMostLostCalls = 64;

}  // namespace

CallSlot::CallSlot(ConnectionTable* table, absl::string_view peer, size_t metadata_bytes)
    : table_(table),
      connection_(table->Find(peer)),
      counted_(connection_ != nullptr && connection_->port() == kPublicPort) {
  if (connection_ != nullptr) {
    connection_->BeginCall(metadata_bytes);
  } else {
    table_->lost_calls().fetch_add(1, std::memory_order_relaxed);
  }
  if (counted_) table_->open_calls().fetch_add(1, std::memory_order_relaxed);
}

CallSlot::~CallSlot() {
  LetGo();
  if (counted_) table_->open_calls().fetch_sub(1, std::memory_order_relaxed);
  if (connection_ == nullptr) {
    table_->lost_calls().fetch_sub(1, std::memory_order_relaxed);
    return;
  }
  const SteadyTime now = std::chrono::steady_clock::now();
  connection_->EndCall(has_message_, table_->limits().message_bytes, now);
  const End end = end_;
  if (end == End::kHere) return;
  const double cancels = end == End::kByClient ? 1.0 : kDeadlineCancels;
  if (!connection_->peer().TakeCancel(now, cancels)) table_->Close(*connection_, Closed::kCancels);
}

absl::Status CallSlot::Check() const {
  if (connection_ == nullptr) {
    if (table_->lost_calls().load(std::memory_order_relaxed) <= kMostLostCalls) return absl::OkStatus();
    return absl::CancelledError("the connection has gone");
  }
  if (!counted_) return absl::OkStatus();
  const TransportLimits& limits = table_->limits();
  if (table_->open_calls().load(std::memory_order_relaxed) > limits.calls) {
    return QuotaExceeded("transport.max_calls", absl::StrCat("the server has ", limits.calls, " open calls, its limit"),
                         kRetry);
  }
  const Peer& peer = connection_->peer();
  if (!peer.gateway() && peer.calls() > limits.calls_per_peer) {
    return QuotaExceeded("transport.max_calls_per_peer",
                         absl::StrCat("this client's address has ", limits.calls_per_peer, " open calls, its limit"),
                         kRetry);
  }
  return absl::OkStatus();
}

absl::Status CallSlot::TakeMessage(size_t bytes) {
  const bool too_large = static_cast<int64_t>(bytes) > max_message_bytes();
  // One that is too large has come like any other, or its connection would be closed for its bytes, with all that runs
  // on it; but of one peer not too many, unless others stand behind it.
  const bool believed = !too_large || connection_ == nullptr || connection_->peer().gateway() ||
                        connection_->peer().TakeBrokenMessage(std::chrono::steady_clock::now());
  if (believed) {
    const bool first = !has_message_.exchange(true);
    if (connection_ != nullptr) connection_->TakeMessage(bytes, /*awaited=*/first);
  }
  if (!too_large) return absl::OkStatus();
  return MessageTooLarge(absl::StrCat("has ", bytes, " bytes"), max_message_bytes());
}

absl::Status CallSlot::Hold(int64_t bytes) {
  const TransportLimits& limits = table_->limits();
  const int64_t all = table_->unread_bytes().fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t here = 0;
  if (connection_ != nullptr) {
    here = connection_->unread_bytes().fetch_add(bytes, std::memory_order_relaxed) + bytes;
  }
  held_bytes_ += bytes;
  const int64_t factor = bytes > kSmallReplyBytes ? 1 : 2;
  if (here <= factor * limits.unread_bytes_per_connection && all <= factor * limits.unread_bytes) {
    return absl::OkStatus();
  }
  LetGo();
  return QuotaExceeded(
      here > factor * limits.unread_bytes_per_connection ? "transport.max_unread_mib_per_connection"
                                                         : "transport.max_unread_mib",
      absl::StrCat("a reply of ", bytes, " bytes cannot wait beside those that clients have not read: ", here - bytes,
                   " bytes on this connection of at most ", limits.unread_bytes_per_connection, ", ", all - bytes,
                   " in all of at most ", limits.unread_bytes),
      kRetry);
}

void CallSlot::LetGo() {
  table_->unread_bytes().fetch_sub(held_bytes_, std::memory_order_relaxed);
  if (connection_ != nullptr) connection_->unread_bytes().fetch_sub(held_bytes_, std::memory_order_relaxed);
  held_bytes_ = 0;
}

}  // namespace dejavu
