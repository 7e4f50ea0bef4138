// HttpServer: serves a few read-only documents over plain HTTP, to Prometheus and to browsers. It answers GET and HEAD.
// One thread serves all connections (libmicrohttpd), so that those which say nothing cost nobody else time; where all
// places are taken, the one that has been idle longest makes room. Start and destroy in one thread.
#ifndef SERVER_OBSERVE_HTTP_SERVER_H_
#define SERVER_OBSERVE_HTTP_SERVER_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/transport/connection_watch.h"

namespace dejavu {

struct HttpDocument {
  std::string path, content_type;
  std::function<std::string()> content;  // called by the server's thread, at each request
};

class HttpServer {
 public:
  // `listen` as for gRPC, "127.0.0.1:9464", or ":9464" for every address; port 0 takes any free one. INVALID_ARGUMENT
  // for what is no address, UNAVAILABLE where the port is taken. The watch must outlive the object.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& listen,
                                                           std::vector<HttpDocument> documents, ConnectionWatch* watch);
  virtual ~HttpServer() = default;

  virtual int port() const = 0;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_HTTP_SERVER_H_
