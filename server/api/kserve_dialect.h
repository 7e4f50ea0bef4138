// KServeDialect: generations in the Open Inference Protocol, with the tensors of Triton's vLLM backend, and token ids
// beside them. ModelInfer has one reply; ModelStreamInfer gives one to each chunk where the tensor `stream` is true.
#ifndef SERVER_API_KSERVE_DIALECT_H_
#define SERVER_API_KSERVE_DIALECT_H_

#include <optional>
#include <string>
#include <vector>

#include "kserve/inference.pb.h"
#include "nlohmann/json_fwd.hpp"
#include "server/api/dialect.h"
#include "server/api/serving_state.h"

namespace dejavu {

// What there is of the model. Triton counts versions; a server has the one.
inline constexpr char kKServeVersion[] = "1";
// NOT_FOUND for another one.
absl::Status CheckKServeVersion(const std::string& version);

struct KServeTensor {
  const char* name;
  inference::DataType type;
  int64_t elements;  // -1: any number
  bool optional;     // of inputs
};
absl::Span<const KServeTensor> KServeInputs();
absl::Span<const KServeTensor> KServeOutputs();
const char* KServeTypeName(inference::DataType type);  // "BYTES"

class KServeDialect final : public Dialect {
 public:
  // `in_stream`: of ModelStreamInfer.
  KServeDialect(const ServedModel& model, bool in_stream) : model_(model), in_stream_(in_stream) {}

  absl::Status Read(const grpc::ByteBuffer& bytes, v1::GenerateRequest* request) override;
  absl::Status Renamed(absl::Status status) const override;
  bool streams() const override { return stream_; }
  bool large_replies() const override { return !in_stream_; }
  SteadyTime::duration timeout() const override { return timeout_; }
  void Take(v1::GenerateChunk* chunk) override;
  const google::protobuf::MessageLite* Next(bool* more) override;
  void Release() override;

  // Of a request that failed, in a stream.
  inference::ModelStreamInferResponse ErrorReply(const absl::Status& status) const;

 private:
  struct Asked {
    bool output_ids = false, finish_reason = false, cumulative_logprob = false, logprobs = false;
    bool num_input_tokens = false, num_output_tokens = false, prompt_logprobs = false, text_output = true;
  };
  absl::Status ReadTensors(const inference::ModelInferRequest& infer, v1::GenerateRequest* request);
  absl::Status ReadOutputs(const inference::ModelInferRequest& infer);
  absl::Status ReadParameters(const inference::ModelInferRequest& infer, bool has_sampling_tensor,
                              v1::GenerateRequest* request);
  absl::Status CheckCombination(const std::optional<bool>& exclude_input, v1::GenerateRequest* request);
  absl::Status CheckLogprobs(const v1::GenerateRequest& request) const;
  inference::ModelInferResponse* Fill(const std::vector<v1::GenerateChunk*>& samples, bool last);
  using Alternatives = google::protobuf::RepeatedPtrField<v1::TokenLogprob>;
  nlohmann::json LogprobsOf(uint32_t id, float logprob, uint32_t rank, const Alternatives& top) const;
  std::string LogprobsText(const v1::GenerateChunk& chunk) const;
  std::string PromptLogprobsText() const;

  const ServedModel& model_;
  const bool in_stream_;
  std::string id_;  // as the client has it; empty where it is too long
  bool stream_ = false;
  bool logprobs_asked_ = false;
  SteadyTime::duration timeout_ = SteadyTime::duration::max();
  std::string prepended_;  // to the text of the output
  Asked asked_;

  v1::GenerateChunk* chunk_ = nullptr;  // of a stream
  GatheredSamples gathered_;            // else
  uint32_t prompt_tokens_ = 0;
  google::protobuf::RepeatedPtrField<v1::ScoredToken> prompt_;  // that no reply has told of
  double cumulative_logprob_ = 0.0;
  inference::ModelStreamInferResponse response_;
};

}  // namespace dejavu

#endif  // SERVER_API_KSERVE_DIALECT_H_
