#include "loadtest/client/channel.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"
#include "grpcpp/support/client_interceptor.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int kMaxReplyBytes = 256 << 20;  // scores of long prompts with many alternatives
constexpr int kMaxRetriedBytes = 4 << 20;  // the largest request by default: a copy is kept until the first reply
constexpr int kKeepaliveTimeMs = 30'000;   // dejavud takes a ping every 10 s at most
constexpr int kKeepaliveTimeoutMs = 10'000;
constexpr int kReconnectMs = 100;  // a server that was started a moment ago; doubles up to
constexpr int kMaxReconnectMs = 1'000;
constexpr int kConnectTimeoutMs = 10'000;
constexpr int kMinResolveMs = 2'000;  // names are looked up again when a connection is lost, at most so often
constexpr size_t kMaxTokenBytes = 4096;

absl::StatusOr<std::string> ReadFile(const char* flag, const std::string& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (file && !text.str().empty()) return text.str();
  return absl::InvalidArgumentError(
      absl::StrCat("cannot use ", flag, " ", path, ": ", errno != 0 ? std::strerror(errno) : "the file is empty"));
}

// "127.0.0.1:50051", "localhost:1", "[::1]:1", "unix:...", and lists such as "ipv4:127.0.0.1:1,127.0.0.1:2".
bool IsLoopback(absl::string_view target) {
  if (absl::StartsWith(target, "unix:")) return true;
  for (const absl::string_view scheme : {"ipv4:", "ipv6:", "dns:"}) {
    if (absl::StartsWith(target, scheme)) target.remove_prefix(scheme.size());
  }
  while (absl::StartsWith(target, "/")) target.remove_prefix(1);
  const std::vector<absl::string_view> addresses = absl::StrSplit(target, ',');
  return std::all_of(addresses.begin(), addresses.end(), [](absl::string_view address) {
    const absl::string_view host = address.substr(0, address.rfind(':'));
    return host == "localhost" || host == "[::1]" ||
           (absl::StartsWith(host, "127.") && host.find_first_not_of("0123456789.") == host.npos);
  });
}

// gRPC's call credentials refuse plain text, loopback included; this adds the same metadata.
class TokenInterceptor final : public grpc::experimental::Interceptor {
 public:
  explicit TokenInterceptor(const std::string* authorization) : authorization_(authorization) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(grpc::experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", *authorization_);
    }
    methods->Proceed();
  }

 private:
  const std::string* const authorization_;
};

class TokenInterceptorFactory final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit TokenInterceptorFactory(absl::string_view token) : authorization_(absl::StrCat("Bearer ", token)) {}

  grpc::experimental::Interceptor* CreateClientInterceptor(grpc::experimental::ClientRpcInfo*) override {
    return new TokenInterceptor(&authorization_);
  }

 private:
  const std::string authorization_;
};

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const ChannelOptions& options) {
  if (options.tls_cert.empty() != options.tls_key.empty()) {
    return absl::InvalidArgumentError("--tls-cert and --tls-key belong together");
  }
  if (options.tls_ca.empty()) {
    if (!options.tls_cert.empty() || !options.tls_server_name.empty()) {
      return absl::InvalidArgumentError("--tls-cert and --tls-server-name need --tls-ca");
    }
    return grpc::InsecureChannelCredentials();
  }
  grpc::SslCredentialsOptions ssl;
  ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadFile("--tls-ca", options.tls_ca));
  if (!options.tls_cert.empty()) {
    ASSIGN_OR_RETURN(ssl.pem_cert_chain, ReadFile("--tls-cert", options.tls_cert));
    ASSIGN_OR_RETURN(ssl.pem_private_key, ReadFile("--tls-key", options.tls_key));
  }
  return grpc::SslCredentials(ssl);
}

absl::StatusOr<std::string> ReadToken(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile("--token-file", path));
  const absl::string_view token = absl::StripAsciiWhitespace(text);
  const bool printable = std::all_of(token.begin(), token.end(), [](char c) { return c > ' ' && c < 127; });
  if (!token.empty() && token.size() <= kMaxTokenBytes && printable) return std::string(token);
  return absl::InvalidArgumentError(absl::StrCat("cannot use --token-file ", path,
                                                 ": it must hold one token of at most ", kMaxTokenBytes,
                                                 " printable characters"));
}

}  // namespace

void AddChannelFlags(CLI::App* program, ChannelOptions* options) {
  const std::string group = "Security";
  program->add_option("--tls-ca", options->tls_ca, "PEM file of who signed the server's certificate; turns TLS on")
      ->envname("DEJAVU_TLS_CA")
      ->group(group);
  program->add_option("--tls-cert", options->tls_cert, "PEM file of the client's own certificate (mTLS)")
      ->envname("DEJAVU_TLS_CERT")
      ->group(group);
  program->add_option("--tls-key", options->tls_key, "PEM file of its key")->envname("DEJAVU_TLS_KEY")->group(group);
  program
      ->add_option("--tls-server-name", options->tls_server_name,
                   "Name in the server's certificate, where another one is dialled")
      ->group(group);
  program->add_option("--token-file", options->token_file, "File with a bearer token")
      ->envname("DEJAVU_TOKEN_FILE")
      ->group(group);
  program
      ->add_flag("--allow-plaintext-token", options->allow_plaintext_token,
                 "Send the token without TLS to another machine too")
      ->group(group);
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& target, const ChannelOptions& options) {
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ChannelCredentials> credentials, MakeCredentials(options));
  grpc::ChannelArguments arguments;
  arguments.SetServiceConfigJSON(kServiceConfig);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, options.retry ? 1 : 0);
  arguments.SetMaxReceiveMessageSize(kMaxReplyBytes);
  arguments.SetInt(GRPC_ARG_PER_RPC_RETRY_BUFFER_SIZE, kMaxRetriedBytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // no limit: a stream may be quiet for long
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kMaxReconnectMs);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kConnectTimeoutMs);  // as gRPC calls it
  arguments.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, kMinResolveMs);
  arguments.SetInt(GRPC_ARG_INHIBIT_HEALTH_CHECKING, options.follow_health ? 0 : 1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  if (!options.tls_server_name.empty()) arguments.SetSslTargetNameOverride(options.tls_server_name);
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
  if (!options.token_file.empty()) {
    if (options.tls_ca.empty() && !IsLoopback(target) && !options.allow_plaintext_token) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the token would cross the network to ", target,
          " in plain text: give --tls-ca, or --allow-plaintext-token where something else protects the connection"));
    }
    ASSIGN_OR_RETURN(const std::string token, ReadToken(options.token_file));
    interceptors.push_back(std::make_unique<TokenInterceptorFactory>(token));
  }
  return grpc::experimental::CreateCustomChannelWithInterceptors(target, credentials, arguments,
                                                                 std::move(interceptors));
}

}  // namespace dejavu
