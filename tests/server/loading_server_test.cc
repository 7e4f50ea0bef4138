// The server before it has a model: what must answer then does, what cannot says so. No engine is needed for any of
// this.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>

#include "dejavu/v1/generation.grpc.pb.h"
#include "gmock/gmock.h"
#include "google/protobuf/descriptor.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"
#include "gtest/gtest.h"
#include "server/server.h"
#include "tests/server/raw_call.h"

namespace dejavu {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using testing::HasSubstr;
using testing::UnorderedElementsAre;

constexpr char kService[] = "dejavu.v1.GenerationService";

class LoadingServer : public testing::Test {
 protected:
  LoadingServer() {
    ServerOptions options;
    options.metrics_listen = "";
    options.listen = "127.0.0.1:0";
    EngineOptions engine_options;
    engine_options.model = EMBEDDED_MODEL "/";
    server_ = Server::Start(options, engine_options).value();
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials());
  }

  HealthCheckResponse::ServingStatus Health(const std::string& service) {
    HealthCheckRequest request;
    request.set_service(service);
    HealthCheckResponse response;
    grpc::ClientContext context;
    EXPECT_TRUE(grpc::health::v1::Health::NewStub(channel_)->Check(&context, request, &response).ok());
    return response.status();
  }

  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(LoadingServer, IsAliveButNotReady) {
  EXPECT_EQ(Health("liveness"), HealthCheckResponse::SERVING);
  EXPECT_EQ(Health(""), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Health(kService), HealthCheckResponse::NOT_SERVING);
  server_->SetFailed();
  EXPECT_EQ(Health("liveness"), HealthCheckResponse::NOT_SERVING);
}

TEST_F(LoadingServer, KnowsNoHealthOfOtherServices) {
  HealthCheckRequest request;
  request.set_service("other");
  HealthCheckResponse response;
  grpc::ClientContext context;
  EXPECT_EQ(grpc::health::v1::Health::NewStub(channel_)->Check(&context, request, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);
  grpc::ClientContext watch_context;
  const auto watch = grpc::health::v1::Health::NewStub(channel_)->Watch(&watch_context, request);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVICE_UNKNOWN);
  watch_context.TryCancel();
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(LoadingServer, TellsWatchersOfEveryChangeAndEndsThemWhenItStops) {
  grpc::ClientContext context;
  HealthCheckRequest request;
  request.set_service("liveness");
  const auto watch = grpc::health::v1::Health::NewStub(channel_)->Watch(&context, request);
  HealthCheckResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  server_->SetFailed();
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  server_->Stop();
  while (watch->Read(&response)) {
  }
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(LoadingServer, RefusesGenerationWithRetryInfo) {
  for (const char* method : {"Generate", "GenerateStream", "Score", "Tokenize", "Detokenize", "GetModelInfo"}) {
    const grpc::Status status = RawCall(channel_, std::string("/") + kService + "/" + method, "");
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << method;
    EXPECT_THAT(status.error_message(), HasSubstr("loading"));
    EXPECT_TRUE(HasDetail(status, "RetryInfo")) << method;
  }
}

TEST_F(LoadingServer, SaysWhatItIs) {
  v1::GetServerInfoResponse info;
  grpc::ClientContext context;
  ASSERT_TRUE(v1::GenerationService::NewStub(channel_)->GetServerInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.state(), v1::SERVER_STATE_LOADING);
  EXPECT_EQ(info.model(), "opt-8m-books");  // the directory was given with a slash at its end
  EXPECT_EQ(info.limits().max_stop_strings(), 8u);
  EXPECT_EQ(info.limits().max_batch(), 16u);
  EXPECT_NE(info.version(), "");
}

TEST_F(LoadingServer, NamesAnUnknownMethod) {
  const grpc::Status status = RawCall(channel_, "/dejavu.v1.Nothing/Here", "");
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(status.error_message(), HasSubstr("/dejavu.v1.Nothing/Here"));
}

TEST_F(LoadingServer, CallsMalformedBytesInvalid) {
  const std::string method = std::string("/") + kService + "/Abort";
  for (const std::string& bytes : {std::string("\xFF\xFF\xFF"),
                                   std::string("\x0A\x7F"
                                               "x"),
                                   std::string("\x0B"), std::string(5000, '\x0B')}) {
    const grpc::Status status = RawCall(channel_, method, bytes);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr("dejavu.v1.AbortRequest"));
  }
  const grpc::Status status = RawCall(channel_, method, std::string("\x0A\x02\xC3\x28"));  // request_id, no UTF-8
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("request_id is not valid UTF-8"));
  EXPECT_TRUE(HasDetail(status, "BadRequest"));
}

TEST_F(LoadingServer, ToleratesUnknownFields) {
  EXPECT_TRUE(RawCall(channel_, std::string("/") + kService + "/GetServerInfo", std::string("\xF8\x07\x01")).ok());
}

TEST_F(LoadingServer, CallsACallWithoutAMessageInvalid) {
  const grpc::Status status = RawCall(channel_, std::string("/") + kService + "/Abort", std::nullopt);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("no request message"));
}

TEST_F(LoadingServer, RefusesMessagesThatAreTooLarge) {
  const grpc::Status status = RawCall(channel_, std::string("/") + kService + "/Abort", std::string(5 << 20, 'x'));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.error_message(),
            "the request has 5242880 bytes; at most 4194304 are taken (transport.max_message_bytes)");
  EXPECT_TRUE(HasDetail(status, "ErrorInfo"));
}

TEST_F(LoadingServer, ReadsCompressedMessages) {
  grpc::ClientContext context;
  context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  v1::AbortRequest request;
  request.set_request_id(std::string(120, 'x'));
  v1::AbortResponse response;
  const grpc::Status status = v1::GenerationService::NewStub(channel_)->Abort(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_FALSE(response.found());
}

TEST_F(LoadingServer, FindsNoRequestToAbort) {
  grpc::ClientContext context;
  v1::AbortRequest request;
  request.set_request_id("nobody");
  v1::AbortResponse response;
  ASSERT_TRUE(v1::GenerationService::NewStub(channel_)->Abort(&context, request, &response).ok());
  EXPECT_FALSE(response.found());
}

template <typename Request, typename Response, typename Stub>
void TestReflection(Stub* stub) {
  grpc::ClientContext context;
  const auto stream = stub->ServerReflectionInfo(&context);
  Request request;
  Response response;
  const auto ask = [&] {
    ASSERT_TRUE(stream->Write(request));
    ASSERT_TRUE(stream->Read(&response));
  };

  request.set_list_services("");
  ask();
  std::set<std::string> services;
  for (const auto& service : response.list_services_response().service()) services.insert(service.name());
  EXPECT_THAT(services,
              UnorderedElementsAre(kService, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                                   "grpc.reflection.v1alpha.ServerReflection", "inference.GRPCInferenceService",
                                   "vllm.grpc.engine.VllmEngine", "xds.service.orca.v3.OpenRcaService"));

  request.set_file_containing_symbol("dejavu.v1.GenerationService.Generate");
  ask();
  ASSERT_EQ(response.file_descriptor_response().file_descriptor_proto_size(), 1);
  google::protobuf::FileDescriptorProto file;
  ASSERT_TRUE(file.ParseFromString(response.file_descriptor_response().file_descriptor_proto(0)));
  EXPECT_EQ(file.name(), "dejavu/v1/generation.proto");

  request.set_file_by_filename("dejavu/rpc/status.proto");  // with its two imports
  ask();
  EXPECT_EQ(response.file_descriptor_response().file_descriptor_proto_size(), 3);

  request.set_file_containing_symbol("no.such.Symbol");
  ask();
  EXPECT_EQ(response.error_response().error_code(), grpc::StatusCode::NOT_FOUND);
  request.set_file_by_filename("../../etc/passwd");
  ask();
  EXPECT_EQ(response.error_response().error_code(), grpc::StatusCode::NOT_FOUND);
  request.set_all_extension_numbers_of_type("dejavu.v1.Limits");
  ask();
  EXPECT_EQ(response.error_response().error_code(), grpc::StatusCode::UNIMPLEMENTED);

  stream->WritesDone();
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(LoadingServer, DescribesItselfThroughReflection) {
  TestReflection<grpc::reflection::v1::ServerReflectionRequest, grpc::reflection::v1::ServerReflectionResponse>(
      grpc::reflection::v1::ServerReflection::NewStub(channel_).get());
}

TEST_F(LoadingServer, DescribesItselfThroughTheOldReflection) {
  TestReflection<grpc::reflection::v1alpha::ServerReflectionRequest,
                 grpc::reflection::v1alpha::ServerReflectionResponse>(
      grpc::reflection::v1alpha::ServerReflection::NewStub(channel_).get());
}

TEST_F(LoadingServer, SharesItsPortWithNobody) {
  ServerOptions options;
  options.metrics_listen = "";
  options.listen = "127.0.0.1:" + std::to_string(server_->port());
  const absl::Status status = Server::Start(options, {}).status();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("cannot listen on " + options.listen));
}

TEST_F(LoadingServer, StopsAtOnceWhenNothingRuns) { EXPECT_TRUE(server_->Drain()); }

TEST(ServerStart, WritesThePortFile) {
  ServerOptions options;
  options.metrics_listen = "";
  options.listen = "127.0.0.1:0";
  options.port_file = (std::filesystem::temp_directory_path() / ("dejavud-port-" + std::to_string(getpid()))).string();
  const auto server = Server::Start(options, {}).value();
  std::ifstream file(options.port_file);
  int port = 0;
  file >> port;
  EXPECT_EQ(port, server->port());
  EXPECT_GT(port, 0);
  EXPECT_FALSE(std::filesystem::exists(options.port_file + ".new"));
  std::filesystem::remove(options.port_file);
}

TEST(ServerStart, RefusesAPortFileThatCannotBeWritten) {
  ServerOptions options;
  options.metrics_listen = "";
  options.listen = "127.0.0.1:0";
  options.port_file = "/nonexistent/port";
  EXPECT_THAT(std::string(Server::Start(options, {}).status().message()), HasSubstr("/nonexistent/port"));
}

TEST(ServerStart, RefusesAddressesWithoutAPort) {
  for (const char* listen :
       {"", "localhost", ":50051", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1"}) {
    ServerOptions options;
    options.metrics_listen = "";
    options.listen = listen;
    EXPECT_TRUE(absl::IsInvalidArgument(Server::Start(options, {}).status())) << listen;
  }
}

}  // namespace
}  // namespace dejavu
