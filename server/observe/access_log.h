// AccessLog: logs one line for every call (server/observe/logging.h); calls of probes and of reflection are logged at
// level debug, and refused ones only so many in a second. Any thread.
#ifndef SERVER_OBSERVE_ACCESS_LOG_H_
#define SERVER_OBSERVE_ACCESS_LOG_H_

#include "server/rpc/request_record.h"

namespace dejavu {

class AccessLog final : public RequestObserver {
 public:
  // 0: all of them.
  explicit AccessLog(int refused_per_s) : refused_per_s_(refused_per_s) {}

  void OnRequestEnd(const RequestRecord& record) override;

 private:
  const int refused_per_s_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_ACCESS_LOG_H_
