// AccessLog: logs one line for every call (server/observe/logging.h); calls of probes and of reflection are logged at
// level debug. Any thread.
#ifndef SERVER_OBSERVE_ACCESS_LOG_H_
#define SERVER_OBSERVE_ACCESS_LOG_H_

#include "server/rpc/request_record.h"

namespace dejavu {

class AccessLog final : public RequestObserver {
 public:
  void OnRequestEnd(const RequestRecord& record) override;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_ACCESS_LOG_H_
