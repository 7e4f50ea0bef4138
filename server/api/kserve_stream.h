// KServeStream: ModelStreamInfer, whose one stream carries any number of requests, several at a time. Each of them is a
// GenerateCall with a record of its own; what fails is said in a reply that names its request, and the stream goes on.
// Threads as RpcHandler says.
#ifndef SERVER_API_KSERVE_STREAM_H_
#define SERVER_API_KSERVE_STREAM_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kserve/inference.pb.h"
#include "server/api/serving_state.h"
#include "server/rpc/rpc.h"

namespace dejavu {

class KServeStream final : public RpcHandler {
 public:
  explicit KServeStream(ServingState* state);
  ~KServeStream() override;

  bool reads_ahead() const override { return true; }
  bool TakesMore() override;
  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override;
  void OnHalfClose() override;
  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override;
  void OnCancel() override;
  void OnEnd(grpc::StatusCode code) override;
  std::string load_report(const std::string& tenant) override;

 private:
  struct Infer;  // a request

  const google::protobuf::MessageLite* NextOf(Infer* infer);

  ServingState& state_;
  std::unique_ptr<Infer> ended_;               // whose last reply may still be read; NextReply's, as the next
  inference::ModelStreamInferResponse error_;  // that was last replied
  size_t turn_ = 0;                            // whose request's reply comes next

  Mutex mutex_;
  std::vector<std::unique_ptr<Infer>> infers_ ABSL_GUARDED_BY(mutex_);
  bool half_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace dejavu

#endif  // SERVER_API_KSERVE_STREAM_H_
