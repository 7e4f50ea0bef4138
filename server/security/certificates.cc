// gRPC asks at every handshake whether there is something new (grpc_ssl_server_certificate_config_callback). The C++
// face has no such credentials, but a ServerCredentials may be derived from.
#include "server/security/certificates.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <ctime>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "grpc/grpc.h"
#include "grpc/grpc_security.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/security/small_file.h"

namespace dejavu {
namespace {

constexpr size_t kMaxPemBytes = 1 << 20;

template <typename T, void (*kFree)(T*)>
struct Free {
  void operator()(T* object) const { kFree(object); }
};
using X509Ptr = std::unique_ptr<X509, Free<X509, X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY, EVP_PKEY_free>>;
using BioPtr = std::unique_ptr<BIO, Free<BIO, BIO_free_all>>;

BioPtr Reader(const std::string& text) { return BioPtr(BIO_new_mem_buf(text.data(), static_cast<int>(text.size()))); }

// Nobody is asked for the passphrase of an encrypted key.
int NoPassphrase(char*, int, int, void*) { return -1; }

absl::StatusOr<X509Ptr> FirstCertificate(const char* option, const std::string& path, const std::string& text) {
  const BioPtr reader = Reader(text);
  X509Ptr certificate(PEM_read_bio_X509(reader.get(), nullptr, NoPassphrase, nullptr));
  ERR_clear_error();
  if (certificate != nullptr) return certificate;
  return absl::InvalidArgumentError(absl::StrCat(option, ": ", path, " holds no certificate in PEM form"));
}

int64_t UnixSeconds(const ASN1_TIME* time) {
  std::tm broken_down = {};
  CHECK(ASN1_TIME_to_tm(time, &broken_down) == 1) << "ASN1_TIME_to_tm";
  return timegm(&broken_down);
}

absl::Status Check(const CertificateFiles& files, Certificates::Pem* pem) {
  ASSIGN_OR_RETURN(const X509Ptr certificate, FirstCertificate("tls.cert", files.cert, pem->cert));
  const BioPtr reader = Reader(pem->key);
  const KeyPtr key(PEM_read_bio_PrivateKey(reader.get(), nullptr, NoPassphrase, nullptr));
  ERR_clear_error();
  if (key == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("tls.key: ", files.key, " holds no private key in PEM form, or an encrypted one"));
  }
  const bool matches = X509_check_private_key(certificate.get(), key.get()) == 1;
  ERR_clear_error();
  if (!matches) {
    return absl::InvalidArgumentError(
        absl::StrCat("tls.key: ", files.key, " is not the key of the certificate tls.cert: ", files.cert));
  }
  pem->expiry_unix_s = UnixSeconds(X509_get0_notAfter(certificate.get()));
  const absl::Time expiry = absl::FromUnixSeconds(pem->expiry_unix_s);
  if (expiry <= absl::Now()) {
    return absl::InvalidArgumentError(absl::StrCat("tls.cert: ", files.cert, " has expired on ",
                                                   absl::FormatTime(absl::RFC3339_sec, expiry, absl::UTCTimeZone())));
  }
  if (files.client_ca.empty()) return absl::OkStatus();
  return FirstCertificate("tls.client_ca", files.client_ca, pem->client_ca).status();
}

// Credentials of one port: it knows what that port has been given last.
class PortCredentials final : public grpc::ServerCredentials {
 public:
  PortCredentials(const Certificates* certificates, bool knows_clients)
      : certificates_(certificates), knows_clients_(knows_clients) {}

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {
    CHECK(false) << "tokens are the gate's affair";
  }

 private:
  static grpc_ssl_certificate_config_reload_status Fetch(void* self, grpc_ssl_server_certificate_config** config) {
    return static_cast<PortCredentials*>(self)->FetchNew(config);
  }

  grpc_ssl_certificate_config_reload_status FetchNew(grpc_ssl_server_certificate_config** config) {
    MutexLock lock(mutex_);
    std::shared_ptr<const Certificates::Pem> current = certificates_->current();
    if (current == given_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair = {current->key.c_str(), current->cert.c_str()};
    // gRPC aborts without authorities, even where no client is asked for a certificate: then any will do.
    const std::string& authorities = knows_clients_ ? current->client_ca : current->cert;
    *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
    given_ = std::move(current);
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  int AddPortToServer(const std::string& address, grpc_server* server) override {
    grpc_ssl_server_credentials_options* const options =
        grpc_ssl_server_credentials_create_options_using_config_fetcher(
            knows_clients_ ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                           : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
            &Fetch, this);
    grpc_server_credentials* const credentials = grpc_ssl_server_credentials_create_with_options(options);
    const int port = grpc_server_add_http2_port(server, address.c_str(), credentials);
    grpc_server_credentials_release(credentials);
    return port;
  }

  const Certificates* const certificates_;
  const bool knows_clients_;

  Mutex mutex_;
  std::shared_ptr<const Certificates::Pem> given_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<Certificates>> Certificates::Load(const CertificateFiles& files) {
  if (files.cert.empty() || files.key.empty()) {
    return absl::InvalidArgumentError("tls.cert and tls.key belong together: one of them is missing");
  }
  std::unique_ptr<Certificates> certificates(new Certificates(files));
  RETURN_IF_ERROR(certificates->Reload().status());
  return certificates;
}

absl::StatusOr<Certificates::Pem> Certificates::Read() const {
  Pem pem;
  ASSIGN_OR_RETURN(pem.cert, ReadSmallFile("tls.cert", files_.cert, kMaxPemBytes));
  ASSIGN_OR_RETURN(pem.key, ReadSmallFile("tls.key", files_.key, kMaxPemBytes));
  if (files_.client_ca.empty()) return pem;
  ASSIGN_OR_RETURN(pem.client_ca, ReadSmallFile("tls.client_ca", files_.client_ca, kMaxPemBytes));
  return pem;
}

absl::StatusOr<bool> Certificates::Reload() {
  ASSIGN_OR_RETURN(Pem pem, Read());
  // They may have been exchanged between two of the reads.
  for (bool still = false; !still;) {
    ASSIGN_OR_RETURN(Pem again, Read());
    still = again.SameText(pem);
    pem = std::move(again);
  }
  if (seen_.has_value() && pem.SameText(*seen_)) return false;
  seen_ = pem;
  RETURN_IF_ERROR(Check(files_, &pem));
  auto shared = std::make_shared<const Pem>(std::move(pem));
  MutexLock lock(mutex_);
  current_ = std::move(shared);
  return true;
}

std::shared_ptr<grpc::ServerCredentials> Certificates::ForPort() {
  ports_.push_back(std::make_shared<PortCredentials>(this, !files_.client_ca.empty()));
  return ports_.back();
}

}  // namespace dejavu
