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
#include "absl/time/time.h"
#include "grpcpp/security/server_credentials.h"
#include "kernels/base/mutex.h"

namespace dejavu {

struct CertificateFiles {
  std::string cert, key;  // PEM; the chain begins with the server's own
  std::string client_ca;  // PEM; not empty: clients must show a certificate that follows from it
};

class Certificates {
 public:
  // INVALID_ARGUMENT names the option and the file: missing, not PEM, not valid yet or no more, a key of another
  // certificate, or what no TLS handshake can use.
  static absl::StatusOr<std::unique_ptr<Certificates>> Load(const CertificateFiles& files);
  // Reads the files again: true where they have changed and new connections see them. After an error the old ones hold;
  // the same files are not complained of twice, unless `again`. Those that were not valid yet are taken in time.
  absl::StatusOr<bool> Reload(bool again = false);

  int64_t expiry_unix_s() const { return absl::ToUnixSeconds(current()->expiry); }

  // For one port of a server that this object outlives. Not beside other calls.
  std::shared_ptr<grpc::ServerCredentials> ForPort();

  // As they are now.
  struct Pem {
    std::string cert, key, client_ca;
    absl::Time begin, expiry;
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
  // What was looked at last, good or not, and when. Load's and Reload's.
  std::optional<Pem> seen_;
  absl::Time seen_at_;
  bool usable_ = false;

  mutable Mutex mutex_;
  std::shared_ptr<const Pem> current_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_SECURITY_CERTIFICATES_H_
