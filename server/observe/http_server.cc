#include "server/observe/http_server.h"

#include <microhttpd.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/options.h"
#include "server/transport/acceptor.h"
#include "server/transport/socket_name.h"

namespace dejavu {
namespace {

constexpr unsigned kIdleTimeoutS = 60;  // Prometheus asks every 15 or 30 s
constexpr size_t kRequestBytes = 2048;  // with what browsers send along

// What a page may load: itself.
constexpr std::pair<const char*, const char*> kHeaders[] = {
    {"Cache-Control", "no-store"},
    {"X-Content-Type-Options", "nosniff"},
    {"Content-Security-Policy",
     "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"},
};

// What MHD keeps for a connection, and what the watch knows of it. Null: it had gone before MHD saw it.
using Watched = std::shared_ptr<Connection>;

Watched* WatchedOf(MHD_Connection* connection) {
  const MHD_ConnectionInfo* const info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
  return info == nullptr ? nullptr : static_cast<Watched*>(info->socket_context);
}

Watched Find(MHD_Connection* connection, ConnectionTable* table) {
  const MHD_ConnectionInfo* const info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
  if (info == nullptr) return nullptr;
  sockaddr_storage address = {};
  std::memcpy(&address, info->client_addr,
              info->client_addr->sa_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in));
  return table->Find(SocketName(address));
}

MHD_Result Send(MHD_Connection* connection, unsigned code, const std::string& type, const std::string& body,
                const char* allow = nullptr) {
  MHD_Response* const response =
      MHD_create_response_from_buffer(body.size(), const_cast<char*>(body.data()), MHD_RESPMEM_MUST_COPY);
  if (response == nullptr) return MHD_NO;
  for (const auto& [name, value] : kHeaders) MHD_add_response_header(response, name, value);
  MHD_add_response_header(response, "Content-Type", type.c_str());
  if (allow != nullptr) MHD_add_response_header(response, "Allow", allow);
  const MHD_Result queued = MHD_queue_response(connection, code, response);
  MHD_destroy_response(response);
  return queued;
}

class MicroHttpServer final : public HttpServer {
 public:
  MicroHttpServer(std::vector<HttpDocument> documents, ConnectionTable* table)
      : documents_(std::move(documents)), table_(table) {}
  ~MicroHttpServer() override {
    acceptor_.reset();
    if (daemon_ != nullptr) MHD_stop_daemon(daemon_);
  }

  absl::Status Listen(const std::string& address, ConnectionWatch* watch) {
    daemon_ = MHD_start_daemon(MHD_USE_EPOLL_INTERNAL_THREAD | MHD_USE_NO_LISTEN_SOCKET | MHD_USE_ITC, 0, nullptr,
                               nullptr, &Answer, this, MHD_OPTION_NOTIFY_CONNECTION, &Note, this,
                               MHD_OPTION_CONNECTION_TIMEOUT, kIdleTimeoutS, MHD_OPTION_END);
    if (daemon_ == nullptr) return absl::UnavailableError("cannot serve HTTP: libmicrohttpd did not start");
    ASSIGN_OR_RETURN(acceptor_, Acceptor::Start(address, kMetricsPort, watch, [this](int fd) { Serve(fd); }));
    return absl::OkStatus();
  }

  int port() const override { return acceptor_->port(); }

 private:
  void Serve(int fd) {
    sockaddr_storage address = {};
    socklen_t size = sizeof(address);
    getpeername(fd, reinterpret_cast<sockaddr*>(&address), &size);
    MHD_add_connection(daemon_, fd, reinterpret_cast<const sockaddr*>(&address), size);  // closes it where it fails
  }

  // MHD closes its descriptor without a word to the other one of the socket, which the watch has.
  static void Note(void* self, MHD_Connection* connection, void** context, MHD_ConnectionNotificationCode what) {
    auto* const server = static_cast<MicroHttpServer*>(self);
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
      *context = new Watched(Find(connection, server->table_));
    } else {
      const std::unique_ptr<Watched> watched(static_cast<Watched*>(*context));
      if (*watched != nullptr) (*watched)->Close();
    }
  }

  static MHD_Result Answer(void* self, MHD_Connection* connection, const char* url, const char* method,
                           const char* /*version*/, const char* /*body*/, size_t* body_bytes, void** request) {
    static char seen;           // MHD calls at least twice for a request
    if (*request == nullptr) {  // the headers are there; a body, which we do not want, may follow
      *request = &seen;
      return MHD_YES;
    }
    if (*body_bytes > 0) {
      *body_bytes = 0;
      return MHD_YES;
    }
    if (const Watched* const watched = WatchedOf(connection); watched != nullptr && *watched != nullptr) {
      (*watched)->BeginCall(kRequestBytes);
      (*watched)->EndCall(/*had_message=*/false, /*message_bytes=*/0, std::chrono::steady_clock::now());
    }
    return static_cast<const MicroHttpServer*>(self)->Reply(connection, url, method);
  }

  MHD_Result Reply(MHD_Connection* connection, absl::string_view url, absl::string_view method) const {
    if (method != "GET" && method != "HEAD") {
      return Send(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "text/plain", "", "GET, HEAD");
    }
    for (const HttpDocument& document : documents_) {
      if (document.path == url) return Send(connection, MHD_HTTP_OK, document.content_type, document.content());
    }
    return Send(connection, MHD_HTTP_NOT_FOUND, "text/plain; charset=utf-8", "there is no such page\n");
  }

  const std::vector<HttpDocument> documents_;
  ConnectionTable* const table_;
  MHD_Daemon* daemon_ = nullptr;
  std::unique_ptr<Acceptor> acceptor_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& listen,
                                                              std::vector<HttpDocument> documents,
                                                              ConnectionWatch* watch) {
  const std::string address = absl::StartsWith(listen, ":") ? absl::StrCat("[::]", listen) : listen;
  if (!IsHostAndPort(address)) {
    return absl::InvalidArgumentError(absl::StrCat("metrics.listen is '", listen, "'; it must be HOST:PORT"));
  }
  auto server = std::make_unique<MicroHttpServer>(std::move(documents), watch->table());
  RETURN_IF_ERROR(server->Listen(address, watch));
  return server;
}

}  // namespace dejavu
