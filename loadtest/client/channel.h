// Channels to dejavud as we advise every client to make them: the published service config (round_robin over all
// addresses whose health says that they serve, retries of what was refused before its first reply), keepalive, TLS, and
// a bearer token. gRPC never retries a stream that has begun. Any thread.
#ifndef LOADTEST_CLIENT_CHANNEL_H_
#define LOADTEST_CLIENT_CHANNEL_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "grpcpp/channel.h"

namespace CLI {
class App;
}

namespace dejavu {

struct ChannelOptions {
  std::string tls_ca;    // PEM file that the server's certificate must follow from; empty: plain text
  std::string tls_cert;  // PEM files of the client's own certificate, where the server wants one
  std::string tls_key;
  std::string tls_server_name;         // the name in the server's certificate, where it is not the one that is dialled
  std::string token_file;              // a bearer token, sent with every call; white space around it is ignored
  bool allow_plaintext_token = false;  // to a server that is not on this machine, without TLS
  // False: calls go to servers that do not serve, too, so that a server that loads can be asked what it does.
  bool follow_health = true;
  bool retry = true;  // what was refused before its first reply; a load test must see refusals
};

// deploy/client/service-config.json.
extern const char kServiceConfig[];

// Adds --tls-ca, --tls-cert, --tls-key, --tls-server-name, --token-file and --allow-plaintext-token.
void AddChannelFlags(CLI::App* program, ChannelOptions* options);

// `target` is HOST:PORT, dns:///NAME:PORT or ipv4:A:PORT,B:PORT. Connects with the first call; two channels share no
// connection. Reads the files now: INVALID_ARGUMENT names the one that cannot be used.
absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& target, const ChannelOptions& options);

}  // namespace dejavu

#endif  // LOADTEST_CLIENT_CHANNEL_H_
