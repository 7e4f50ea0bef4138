#include "server/observe/http_server.h"

#include <CivetServer.h>

#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

// What a page may load: itself.
constexpr char kHeaders[] =
    "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
    "Content-Security-Policy: default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'\r\n";

class Document final : public CivetHandler {
 public:
  Document(std::string path, std::string content_type, std::function<std::string()> content)
      : path_(std::move(path)), content_type_(std::move(content_type)), content_(std::move(content)) {}

  bool handleGet(CivetServer*, mg_connection* connection) override { return Answer(connection, true); }
  bool handleHead(CivetServer*, mg_connection* connection) override { return Answer(connection, false); }
  bool handlePost(CivetServer*, mg_connection* connection) override { return RefuseMethod(connection); }
  bool handlePut(CivetServer*, mg_connection* connection) override { return RefuseMethod(connection); }
  bool handleDelete(CivetServer*, mg_connection* connection) override { return RefuseMethod(connection); }
  bool handlePatch(CivetServer*, mg_connection* connection) override { return RefuseMethod(connection); }
  bool handleOptions(CivetServer*, mg_connection* connection) override { return RefuseMethod(connection); }

 private:
  bool Answer(mg_connection* connection, bool with_body) {
    if (mg_get_request_info(connection)->local_uri != path_) {  // handlers get what lies below their path, too
      mg_send_http_error(connection, 404, "%s", "there is no such page");
      return true;
    }
    const std::string body = content_();
    mg_printf(connection, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %zu\r\n%s\r\n", content_type_.c_str(),
              body.size(), kHeaders);
    if (with_body) mg_write(connection, body.data(), body.size());
    return true;
  }
  bool RefuseMethod(mg_connection* connection) {
    mg_printf(connection, "HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\nContent-Length: 0\r\n%s\r\n",
              kHeaders);
    return true;
  }

  const std::string path_, content_type_;
  const std::function<std::string()> content_;
};

class CivetHttpServer final : public HttpServer {
 public:
  explicit CivetHttpServer(std::unique_ptr<CivetServer> server) : server_(std::move(server)) {}
  ~CivetHttpServer() override { server_->close(); }  // before what it still may call

  int port() const override { return server_->getListeningPorts().front(); }
  void Handle(const std::string& path, const std::string& content_type, std::function<std::string()> content) override {
    documents_.push_back(std::make_unique<Document>(path, content_type, std::move(content)));
    server_->addHandler(path, documents_.back().get());
  }

 private:
  std::vector<std::unique_ptr<Document>> documents_;
  const std::unique_ptr<CivetServer> server_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& listen) {
  const size_t colon = listen.rfind(':');
  int port = -1;
  if (colon == std::string::npos || !absl::SimpleAtoi(listen.substr(colon + 1), &port) || port < 0 || port > 65535 ||
      listen.find_first_of(",s \t\r\n", colon) != std::string::npos || listen.find(',') != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat("metrics.listen is '", listen, "'; it must be HOST:PORT"));
  }
  const std::string address = colon == 0 ? listen.substr(1) : listen;  // ":9464" is every address
  const std::vector<std::string> options = {"listening_ports",       address, "num_threads",       "2",
                                            "request_timeout_ms",    "10000", "enable_keep_alive", "yes",
                                            "keep_alive_timeout_ms", "5000"};
  try {
    return std::make_unique<CivetHttpServer>(std::make_unique<CivetServer>(options));
  } catch (const CivetException& error) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", listen, " for metrics: ", error.what()));
  }
}

}  // namespace dejavu
