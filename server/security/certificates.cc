// gRPC asks at every handshake whether there is something new (grpc_ssl_server_certificate_config_callback). The C++
// face has no such credentials, but a ServerCredentials may be derived from.
#include "server/security/certificates.h"

#include <openssl/err.h>

#include <ctime>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "grpc/grpc.h"
#include "grpc/grpc_security.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/security/handshake_trial.h"
#include "server/security/openssl_pointers.h"
#include "server/security/small_file.h"

namespace dejavu {
namespace {

constexpr size_t kMaxPemBytes = 1 << 20;
constexpr int kMostReads = 100;  // until two of them agree

// Clocks of issuers and servers differ by seconds; a certificate that begins so soon is as good as valid.
constexpr absl::Duration kClockSkew = absl::Minutes(1);

absl::StatusOr<X509Ptr> FirstCertificate(const char* option, const std::string& path, const std::string& text) {
  const BioPtr reader = PemReader(text);
  X509Ptr certificate = NextCertificate(reader.get());
  ERR_clear_error();
  if (certificate != nullptr) return certificate;
  return absl::InvalidArgumentError(absl::StrCat(option, ": ", path, " holds no certificate in PEM form"));
}

// A certificate may hold anything in place of a time.
absl::StatusOr<absl::Time> TimeOf(const ASN1_TIME* time, absl::string_view what, const std::string& path) {
  std::tm broken_down = {};
  const bool read = time != nullptr && ASN1_TIME_to_tm(time, &broken_down) == 1;
  ERR_clear_error();
  if (read) return absl::FromTimeT(timegm(&broken_down));
  return absl::InvalidArgumentError(absl::StrCat("tls.cert: ", path, " holds no time that could be read as ", what));
}

std::string DateText(absl::Time time) { return absl::FormatTime(absl::RFC3339_sec, time, absl::UTCTimeZone()); }

bool HasBegun(const Certificates::Pem& pem, absl::Time now) { return pem.begin <= now + kClockSkew; }

absl::Status CheckLifetime(const std::string& path, const Certificates::Pem& pem) {
  const absl::Time now = absl::Now();
  if (!HasBegun(pem, now)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tls.cert: ", path, " is not valid before ", DateText(pem.begin), "; now it is ", DateText(now)));
  }
  if (pem.expiry > now) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tls.cert: ", path, " has expired on ", DateText(pem.expiry)));
}

std::string KeyText(EVP_PKEY* key) {
  const char* const type = EVP_PKEY_get0_type_name(key);
  return absl::StrCat(type == nullptr ? "unknown" : type, " key of ", EVP_PKEY_get_bits(key), " bits");
}

absl::Status Check(const CertificateFiles& files, Certificates::Pem* pem) {
  ASSIGN_OR_RETURN(const X509Ptr certificate, FirstCertificate("tls.cert", files.cert, pem->cert));
  const KeyPtr key = PrivateKeyFrom(pem->key);
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
  ASSIGN_OR_RETURN(pem->begin, TimeOf(X509_get0_notBefore(certificate.get()), "the begin of its life", files.cert));
  ASSIGN_OR_RETURN(pem->expiry, TimeOf(X509_get0_notAfter(certificate.get()), "the end of its life", files.cert));
  RETURN_IF_ERROR(CheckLifetime(files.cert, *pem));
  if (!files.client_ca.empty()) {
    RETURN_IF_ERROR(FirstCertificate("tls.client_ca", files.client_ca, pem->client_ca).status());
  }
  const absl::Status usable = TryHandshake(pem->cert, pem->key, pem->client_ca);
  if (usable.ok()) return usable;
  return absl::InvalidArgumentError(absl::StrCat("tls.cert: ", files.cert, " with its ", KeyText(key.get()),
                                                 " serves no TLS connection: ", usable.message()));
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

absl::StatusOr<bool> Certificates::Reload(bool again) {
  ASSIGN_OR_RETURN(Pem pem, Read());
  // They may have been exchanged between two of the reads.
  bool still = false;
  for (int reads = 1; !still; ++reads) {
    if (reads == kMostReads) return absl::InvalidArgumentError("tls.cert and tls.key do not stop changing");
    ASSIGN_OR_RETURN(Pem next, Read());
    still = next.SameText(pem);
    pem = std::move(next);
  }
  const bool known = seen_.has_value() && pem.SameText(*seen_);
  const bool begun = seen_.has_value() && !HasBegun(*seen_, seen_at_) && HasBegun(*seen_, absl::Now());
  if (known && (usable_ || !(again || begun))) return false;
  const absl::Status status = Check(files_, &pem);
  seen_ = pem;
  seen_at_ = absl::Now();
  usable_ = status.ok();
  RETURN_IF_ERROR(status);
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
