// Security: the certificates and tokens that the options name, looked at again every `tls.reload_s` seconds, or when
// asked, by a thread of its own, because secrets are rotated under a running server. What is wrong is logged and
// counted, and changes nothing. Any thread, but CredentialsForPort before the others.
#ifndef SERVER_SECURITY_SECURITY_H_
#define SERVER_SECURITY_SECURITY_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "grpcpp/security/server_credentials.h"
#include "kernels/base/mutex.h"
#include "server/options.h"
#include "server/security/certificates.h"
#include "server/security/tokens.h"

namespace dejavu {

class Security {
 public:
  // INVALID_ARGUMENT for files that cannot be used, and for tokens that would cross a network in plain text.
  static absl::StatusOr<std::unique_ptr<Security>> Load(const ServerOptions& options);
  ~Security();

  const Tokens* tokens() const { return tokens_.get(); }  // null: everybody may call

  // TLS, or plain text where no certificate is named. The object must outlive the port.
  std::shared_ptr<grpc::ServerCredentials> CredentialsForPort();

  // Has the thread look now, and tell of what it finds even if that is old. Returns at once. Nothing where there is
  // nothing to look at.
  void LookNow();

  const Certificates* certificates() const { return certificates_.get(); }  // null: plain text
  // How often changed files took effect, and how often they could not be used.
  int64_t reloads() const { return reloads_.load(std::memory_order_relaxed); }
  int64_t reload_failures() const { return failures_.load(std::memory_order_relaxed); }

 private:
  explicit Security(const ServerOptions& options) : options_(options) {}

  void Run();
  void Note(const char* what, bool asked, const absl::StatusOr<bool>& changed);

  const ServerOptions options_;
  std::unique_ptr<Certificates> certificates_;  // null: no TLS
  std::unique_ptr<Tokens> tokens_;
  std::atomic<int64_t> reloads_{0}, failures_{0};

  Mutex mutex_;
  CondVar wake_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool asked_ ABSL_GUARDED_BY(mutex_) = false;  // to look now
  std::thread thread_;                          // none where there is nothing to look at
};

}  // namespace dejavu

#endif  // SERVER_SECURITY_SECURITY_H_
