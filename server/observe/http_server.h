// HttpServer: serves a few read-only documents over plain HTTP, to Prometheus and to browsers. It answers GET and HEAD
// with two threads, so that one slow reader does not block another. Start and destroy in one thread.
#ifndef SERVER_OBSERVE_HTTP_SERVER_H_
#define SERVER_OBSERVE_HTTP_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace dejavu {

class HttpServer {
 public:
  // `listen` as for gRPC, "127.0.0.1:9464"; port 0 takes any free one. INVALID_ARGUMENT for what is no address,
  // UNAVAILABLE where the port is taken.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& listen);
  virtual ~HttpServer() = default;

  virtual int port() const = 0;

  // Answers requests for exactly that path with what `content` returns. The server's two threads may call it at once.
  // Before the first request.
  virtual void Handle(const std::string& path, const std::string& content_type,
                      std::function<std::string()> content) = 0;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_HTTP_SERVER_H_
