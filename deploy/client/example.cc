// Streams a text from dejavud as any client should: with the published service config, keepalive and a deadline.
//   example TARGET SERVICE_CONFIG.json PROMPT [CA.crt [TOKEN_FILE]]
// such as example dns:///dejavud.default.svc:50051 deploy/client/service-config.json "It was a dark night, and"
#include <chrono>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>

#include "dejavu/v1/generation.grpc.pb.h"
#include "grpcpp/grpcpp.h"

namespace {

std::string Read(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

std::shared_ptr<grpc::Channel> Connect(const std::string& target, const std::string& service_config,
                                       const std::string& authority) {
  grpc::ChannelArguments arguments;
  arguments.SetServiceConfigJSON(service_config);        // round_robin over healthy replicas, retries
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);  // dejavud takes a ping every 10 s
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1'000);  // a replica that restarts is used soon
  if (authority.empty()) return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = authority;
  return grpc::CreateCustomChannel(target, grpc::SslCredentials(ssl), arguments);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc > 6) {
    std::cerr << "usage: example TARGET SERVICE_CONFIG.json PROMPT [CA.crt [TOKEN_FILE]]\n";
    return 2;
  }
  const std::shared_ptr<grpc::Channel> channel = Connect(argv[1], Read(argv[2]), argc > 4 ? Read(argv[4]) : "");
  const auto stub = dejavu::v1::GenerationService::NewStub(channel);

  dejavu::v1::GenerateRequest request;
  request.set_text(argv[3]);
  request.mutable_stopping()->set_max_new_tokens(40);
  request.mutable_sampling()->set_seed(7);

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  if (argc > 5) {
    std::string token;
    std::ifstream(argv[5]) >> token;
    context.AddMetadata("authorization", "Bearer " + token);
  }
  const auto reader = stub->GenerateStream(&context, request);
  dejavu::v1::GenerateChunk chunk;
  while (reader->Read(&chunk)) std::cout << chunk.text() << std::flush;
  std::cout << "\n";
  // gRPC retries what was refused, and no stream that has begun: after UNAVAILABLE in the middle, ask again.
  const grpc::Status status = reader->Finish();
  if (!status.ok()) std::cerr << status.error_code() << ": " << status.error_message() << "\n";
  return status.ok() ? 0 : 1;
}
