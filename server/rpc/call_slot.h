// CallSlot: the place that one call takes, as long as it lasts: among the open calls of the server and of its peer, and
// of what clients may leave unread. Any thread; Hold and LetGo are called by turns.
#ifndef SERVER_RPC_CALL_SLOT_H_
#define SERVER_RPC_CALL_SLOT_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/transport/connection_table.h"

namespace dejavu {

class CallSlot {
 public:
  // `peer` as gRPC names it. The table must outlive the object.
  CallSlot(ConnectionTable* table, absl::string_view peer, size_t metadata_bytes);
  ~CallSlot();
  CallSlot(const CallSlot&) = delete;
  CallSlot& operator=(const CallSlot&) = delete;

  // RESOURCE_EXHAUSTED: too many calls are open; this one, already counted, must end at once.
  absl::Status Check() const;

  // A request message of so many bytes has come. RESOURCE_EXHAUSTED: they are more than max_message_bytes().
  absl::Status TakeMessage(size_t bytes);
  int64_t max_message_bytes() const { return table_->limits().message_bytes; }

  // The connection was closed from here, and its client hears UNAVAILABLE.
  bool closed_here() const { return connection_ != nullptr && connection_->closed(); }

  // Others stand behind the connection's other end, and it may say which of them calls.
  bool through_gateway() const { return connection_ != nullptr && connection_->peer().gateway(); }

  // gRPC gets a reply of so many bytes, and has sent it. RESOURCE_EXHAUSTED: it is large, and clients have left too
  // much unread already.
  absl::Status Hold(int64_t bytes);
  void LetGo();

  // The client has ended the call, by itself or by leaving, or its deadline has.
  void NoteEnd(bool by_deadline) { end_ = by_deadline ? End::kByDeadline : End::kByClient; }

 private:
  ConnectionTable* const table_;
  const std::shared_ptr<Connection> connection_;  // null: it has gone before its call was seen
  const bool counted_;                            // operators' calls and probes take no place from clients
  std::atomic<bool> has_message_{false};
  enum class End { kHere, kByClient, kByDeadline };
  std::atomic<End> end_{End::kHere};
  int64_t held_bytes_ = 0;
};

}  // namespace dejavu

#endif  // SERVER_RPC_CALL_SLOT_H_
