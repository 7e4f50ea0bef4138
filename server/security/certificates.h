// Certificates: what the server shows of itself over TLS, and by whose certificates it knows its clients. Certificate,
// key and the clients' authority change together or not at all: gRPC's own file watcher takes each file as it comes, so
// a rotation that is half done, or wrong, would break every new connection. Connections that stand are not touched.
// TLS 1.2 or 1.3. Reload is one thread's; the rest any thread's.
#ifndef SERVER_SECURITY_CERTIFICATES_H_
#define SERVER_SECURITY_CERTIFICATES_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "grpcpp/security/server_credentials.h"
#include "kernels/base/mutex.h"

namespace dejavu {

struct CertificateFiles {
  std::string cert, key;  // PEM; the chain begins with the server's own
  std::string client_ca;  // PEM; not empty: clients must show a certificate that follows from it
};

class Certificates {
 public:
  // INVALID_ARGUMENT names the option and the file: missing, not PEM, expired, or a key of another certificate.
  static absl::StatusOr<std::unique_ptr<Certificates>> Load(const CertificateFiles& files);
  // Reads the files again: true where they have changed and new connections see them. After an error the old ones hold.
  absl::StatusOr<bool> Reload();

  int64_t expiry_unix_s() const { return current()->expiry_unix_s; }

  // For one port of a server that this object outlives. Not beside other calls.
  std::shared_ptr<grpc::ServerCredentials> ForPort();

  // As they are now.
  struct Pem {
    std::string cert, key, client_ca;
    int64_t expiry_unix_s = 0;
    bool SameText(const Pem& other) const {
      return cert == other.cert && key == other.key && client_ca == other.client_ca;
    }
  };
  std::shared_ptr<const Pem> current() const {
    MutexLock lock(mutex_);
    return current_;
  }

 private:
  explicit Certificates(CertificateFiles files) : files_(std::move(files)) {}

  absl::StatusOr<Pem> Read() const;

  const CertificateFiles files_;
  std::vector<std::shared_ptr<grpc::ServerCredentials>> ports_;  // gRPC calls them back as long as it runs
  std::optional<Pem> seen_;  // that were looked at last, good or not; Load's and Reload's

  mutable Mutex mutex_;
  std::shared_ptr<const Pem> current_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_SECURITY_CERTIFICATES_H_
