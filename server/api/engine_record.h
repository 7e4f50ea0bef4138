// EngineRecord: what a call that the engine works on adds to its record. Written by the call's handler in OnRequest,
// read once the call is over, perhaps before the engine has let go of it.
#ifndef SERVER_API_ENGINE_RECORD_H_
#define SERVER_API_ENGINE_RECORD_H_

#include <atomic>
#include <memory>
#include <vector>

#include "server/api/reply_sink.h"
#include "server/rpc/call_report.h"
#include "server/rpc/quotas.h"
#include "server/rpc/request_record.h"

namespace dejavu {

class EngineRecord final : public RecordSource {
 public:
  RequestAsked asked;
  std::vector<std::shared_ptr<ReplySink>> sinks;  // that the engine has taken
  std::unique_ptr<QuotaLease> lease;              // of its tenant's quotas; null: it has none
  std::atomic<bool> stopped{false};               // by the end of the server; from any thread

  // Settles the lease if the engine is done. True: it is.
  bool Settle();

  bool Fill(RequestRecord* record) override;

 private:
  bool Finished();
};

}  // namespace dejavu

#endif  // SERVER_API_ENGINE_RECORD_H_
