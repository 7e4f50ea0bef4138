#include "tests/bench/api_client.h"

#include <utility>

#include "dejavu/v1/generation.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "kernels/base/check.h"
#include "kserve/inference.grpc.pb.h"
#include "nlohmann/json.hpp"
#include "vllm/engine.grpc.pb.h"

namespace dejavu {
namespace {

class OwnClient final : public ApiClient {
 public:
  OwnClient(const std::shared_ptr<grpc::Channel>& channel, std::vector<int32_t> prompt)
      : stub_(v1::GenerationService::NewStub(channel)), prompt_(std::move(prompt)) {}

  grpc::Status Stream(int tokens, const std::function<void(int)>& on_tokens) override {
    grpc::ClientContext context;
    const auto reader = stub_->GenerateStream(&context, OwnRequest(prompt_, tokens));
    v1::GenerateChunk chunk;
    while (reader->Read(&chunk)) {
      if (!chunk.token_ids().empty()) on_tokens(chunk.token_ids_size());
    }
    return reader->Finish();
  }

 private:
  const std::unique_ptr<v1::GenerationService::Stub> stub_;
  const std::vector<int32_t> prompt_;
};

// With tensors in raw bytes, as stock clients send them.
class KServeClient final : public ApiClient {
 public:
  KServeClient(const std::shared_ptr<grpc::Channel>& channel, std::string model, std::vector<int32_t> prompt)
      : stub_(inference::GRPCInferenceService::NewStub(channel)),
        model_(std::move(model)),
        prompt_(std::move(prompt)) {}

  grpc::Status Stream(int tokens, const std::function<void(int)>& on_tokens) override {
    grpc::ClientContext context;
    const auto stream = stub_->ModelStreamInfer(&context);
    stream->Write(RequestOf(tokens));
    stream->WritesDone();
    inference::ModelStreamInferResponse reply;
    std::string error;
    while (stream->Read(&reply)) {
      if (!reply.error_message().empty()) error = reply.error_message();
      for (const auto& output : reply.infer_response().outputs()) {
        if (output.name() == "output_ids" && output.shape(0) > 0) on_tokens(static_cast<int>(output.shape(0)));
      }
    }
    const grpc::Status status = stream->Finish();
    return status.ok() && !error.empty() ? grpc::Status(grpc::StatusCode::UNKNOWN, error) : status;
  }

 private:
  inference::ModelInferRequest RequestOf(int tokens) const {
    inference::ModelInferRequest request;
    request.set_model_name(model_);
    const auto add = [&request](const char* name, const char* datatype, size_t elements, std::string raw) {
      auto* const tensor = request.add_inputs();
      tensor->set_name(name);
      tensor->set_datatype(datatype);
      tensor->add_shape(static_cast<int64_t>(elements));
      request.add_raw_input_contents(std::move(raw));
    };
    const auto bytes = [](const void* data, size_t size) { return std::string(static_cast<const char*>(data), size); };
    add("input_ids", "INT32", prompt_.size(), bytes(prompt_.data(), prompt_.size() * sizeof(int32_t)));
    add("stream", "BOOL", 1, std::string(1, '\1'));
    const std::string sampling =
        nlohmann::json{{"temperature", 0}, {"max_tokens", tokens}, {"ignore_eos", true}}.dump();
    const auto length = static_cast<uint32_t>(sampling.size());
    add("sampling_parameters", "BYTES", 1, bytes(&length, sizeof(length)) + sampling);
    for (const char* const name : {"text_output", "output_ids"}) request.add_outputs()->set_name(name);
    return request;
  }

  const std::unique_ptr<inference::GRPCInferenceService::Stub> stub_;
  const std::string model_;
  const std::vector<int32_t> prompt_;
};

class VllmClient final : public ApiClient {
 public:
  VllmClient(const std::shared_ptr<grpc::Channel>& channel, std::vector<int32_t> prompt)
      : stub_(vllm::grpc::engine::VllmEngine::NewStub(channel)), prompt_(std::move(prompt)) {}

  grpc::Status Stream(int tokens, const std::function<void(int)>& on_tokens) override {
    vllm::grpc::engine::GenerateRequest request;
    request.mutable_tokenized()->mutable_input_ids()->Assign(prompt_.begin(), prompt_.end());
    request.mutable_sampling_params()->set_temperature(0.0f);
    request.mutable_sampling_params()->set_max_tokens(static_cast<uint32_t>(tokens));
    request.mutable_sampling_params()->set_ignore_eos(true);
    request.set_stream(true);
    grpc::ClientContext context;
    const auto reader = stub_->Generate(&context, request);
    vllm::grpc::engine::GenerateResponse reply;
    while (reader->Read(&reply)) {  // the last one, complete, has the ids of the last chunk again
      if (!reply.chunk().token_ids().empty()) on_tokens(reply.chunk().token_ids_size());
    }
    return reader->Finish();
  }

 private:
  const std::unique_ptr<vllm::grpc::engine::VllmEngine::Stub> stub_;
  const std::vector<int32_t> prompt_;
};

}  // namespace

std::unique_ptr<ApiClient> MakeApiClient(const std::string& api, const std::shared_ptr<grpc::Channel>& channel,
                                         const std::string& model, const std::vector<int32_t>& prompt) {
  if (api == "kserve") return std::make_unique<KServeClient>(channel, model, prompt);
  if (api == "vllm") return std::make_unique<VllmClient>(channel, prompt);
  CHECK(api == kApis.front());
  return std::make_unique<OwnClient>(channel, prompt);
}

v1::GenerateRequest OwnRequest(const std::vector<int32_t>& prompt, int tokens) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(prompt.begin(), prompt.end());
  request.mutable_stopping()->set_max_new_tokens(static_cast<uint32_t>(tokens));
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

}  // namespace dejavu
