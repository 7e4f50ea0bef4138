// Certificates, keys and authorities: as text, and as the bytes inside of the text, which a change of the text seldom
// reaches. What is accepted is a pair that OpenSSL's servers take, and is valid now.
#include <openssl/bio.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>

#include <ctime>
#include <memory>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/security/certificates.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

// A pair for these tests alone, valid until 2100.
constexpr char kKey[] =
    "-----BEGIN PRIVATE KEY-----\n"
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgQ8Si4RkrkOMmRiQB\n"
    "KlZ8m9KmWwYKXzKoYlPji8XC+yWhRANCAAQWXVTSjW2lT0w6XSAjBylWpV6CQ6Yt\n"
    "gPQ0F8gt74mKcW1pm6Ls7E5TU3K1+cSmWe7h3+/D1qZ/xVv10lLKiLHY\n"
    "-----END PRIVATE KEY-----\n";
constexpr char kCertificate[] =
    "-----BEGIN CERTIFICATE-----\n"
    "MIIBVjCB/aADAgECAgEBMAoGCCqGSM49BAMCMA8xDTALBgNVBAMMBGZ1enowIBcN\n"
    "MDAwMTAxMDAwMDAwWhgPMjEwMDAxMDEwMDAwMDBaMA8xDTALBgNVBAMMBGZ1enow\n"
    "WTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQWXVTSjW2lT0w6XSAjBylWpV6CQ6Yt\n"
    "gPQ0F8gt74mKcW1pm6Ls7E5TU3K1+cSmWe7h3+/D1qZ/xVv10lLKiLHYo0gwRjAU\n"
    "BgNVHREEDTALgglsb2NhbGhvc3QwDwYDVR0TAQH/BAUwAwEB/zAdBgNVHQ4EFgQU\n"
    "iYo32dKq0m64crD4yGX+TpTiX18wCgYIKoZIzj0EAwIDSAAwRQIgVfDXFfMLsa2S\n"
    "PekVHMDimetyMjOlkD99OLi6Man2qWkCIQDGQdl4Ggacsj+RCNk2OjZ1cLEaIhhh\n"
    "CXkucAjVFU5fbw==\n"
    "-----END CERTIFICATE-----\n";

std::string Pem(const char* label, absl::string_view der) {
  std::string pem = absl::StrCat("-----BEGIN ", label, "-----\n");
  const std::string base64 = absl::Base64Escape(der);
  for (size_t at = 0; at < base64.size(); at += 64) absl::StrAppend(&pem, base64.substr(at, 64), "\n");
  return absl::StrCat(pem, "-----END ", label, "-----\n");
}

std::string Der(absl::string_view pem) {
  std::string base64, der;
  for (const absl::string_view line : absl::StrSplit(pem, '\n')) {
    if (!absl::StartsWith(line, "-----")) absl::StrAppend(&base64, line);
  }
  CHECK(absl::Base64Unescape(base64, &der)) << pem;
  return der;
}

// What a TLS server would load.
bool IsPair(const std::string& certificate, const std::string& key) {
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_server_method()), SSL_CTX_free);
  const std::unique_ptr<BIO, decltype(&BIO_free_all)> of_certificate(
      BIO_new_mem_buf(certificate.data(), static_cast<int>(certificate.size())), BIO_free_all);
  const std::unique_ptr<BIO, decltype(&BIO_free_all)> of_key(BIO_new_mem_buf(key.data(), static_cast<int>(key.size())),
                                                             BIO_free_all);
  const std::unique_ptr<X509, decltype(&X509_free)> x509(
      PEM_read_bio_X509(of_certificate.get(), nullptr, nullptr, nullptr), X509_free);
  const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> pkey(
      PEM_read_bio_PrivateKey(of_key.get(), nullptr, nullptr, nullptr), EVP_PKEY_free);
  return x509 != nullptr && pkey != nullptr && SSL_CTX_use_certificate(context.get(), x509.get()) == 1 &&
         SSL_CTX_use_PrivateKey(context.get(), pkey.get()) == 1;
}

void Run(absl::string_view bytes) {
  static const FuzzFiles& files = *new FuzzFiles;
  FuzzInput input(bytes);
  std::string certificate = kCertificate, key = kKey, authority = kCertificate;
  switch (input.Byte() % 4) {
    case 0:
      certificate = std::string(input.Section());
      key = std::string(input.Section());
      authority = std::string(input.Rest());
      break;
    case 1:
      certificate = Pem("CERTIFICATE", input.Rest());
      break;
    case 2:
      key = Pem("PRIVATE KEY", input.Rest());
      break;
    default:
      authority = Pem("CERTIFICATE", input.Rest());
  }
  const CertificateFiles paths = {files.Write("tls.crt", certificate), files.Write("tls.key", key),
                                  authority.empty() ? "" : files.Write("ca.crt", authority)};
  const absl::StatusOr<std::unique_ptr<Certificates>> loaded = Certificates::Load(paths);
  CheckAnswer(loaded.status(), {absl::StatusCode::kInvalidArgument});
  if (!loaded.ok()) return;
  CHECK(IsPair(certificate, key)) << "no server could use them";
  CHECK((*loaded)->expiry_unix_s() >= std::time(nullptr) - 10) << (*loaded)->expiry_unix_s();
  CHECK((*loaded)->current()->cert == certificate && (*loaded)->current()->key == key) << "other texts";
  CHECK(!*(*loaded)->Reload()) << "files that have not changed";
}

}  // namespace

FuzzTarget CertificatesTarget() {
  const std::string both = absl::StrCat(kCertificate, "\x1e", kKey, "\x1e");
  const std::string zero(1, '\0');
  return {
      "certificates",
      4096,
      Run,
      {zero + both, zero + both + kCertificate, "\1" + Der(kCertificate), "\2" + Der(kKey), "\3" + Der(kCertificate)},
      {"-----BEGIN CERTIFICATE-----\n", "-----END CERTIFICATE-----\n", "-----BEGIN PRIVATE KEY-----\n",
       "-----BEGIN EC PRIVATE KEY-----\n", "-----BEGIN ENCRYPTED PRIVATE KEY-----\n", "Proc-Type: 4,ENCRYPTED\n",
       "\x1e",
       Raw("\x17\x0d"
           "491231235959Z"),
       Raw("\x18\x0f"
           "99991231235959Z"),
       "\x30\x82", "\x02\x01", "\x06\x03\x2b\x65\x70", "\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07", "\x30\x80",
       "\xff\xff\xff\xff"}};
}

}  // namespace dejavu
