// Certificates as the world may hand them over. They are made here, so that they can be wrong in any way.
#include "server/security/certificates.h"

#include <openssl/evp.h>
#include <openssl/rsa.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/security/handshake_trial.h"
#include "server/security/openssl_pointers.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using testing::HasSubstr;

constexpr long kHour = 3600;

std::string Pem(BIO* memory) {
  char* data = nullptr;
  const long bytes = BIO_get_mem_data(memory, &data);
  return std::string(data, static_cast<size_t>(bytes));
}

std::string KeyPem(EVP_PKEY* key) {
  const BioPtr memory(BIO_new(BIO_s_mem()));
  PEM_write_bio_PrivateKey(memory.get(), key, nullptr, nullptr, 0, nullptr, nullptr);
  return Pem(memory.get());
}

KeyPtr EcKey(const char* curve = "P-256") { return KeyPtr(EVP_EC_gen(curve)); }
KeyPtr RsaKey(size_t bits) { return KeyPtr(EVP_RSA_gen(bits)); }
KeyPtr NamedKey(const char* type) { return KeyPtr(EVP_PKEY_Q_keygen(nullptr, nullptr, type)); }

KeyPtr DsaKey() {
  EVP_PKEY* parameters = nullptr;
  EVP_PKEY* key = nullptr;
  EVP_PKEY_CTX* context = EVP_PKEY_CTX_new_from_name(nullptr, "DSA", nullptr);
  EVP_PKEY_paramgen_init(context);
  EVP_PKEY_CTX_set_dsa_paramgen_bits(context, 1024);
  EVP_PKEY_paramgen(context, &parameters);
  EVP_PKEY_CTX_free(context);
  context = EVP_PKEY_CTX_new_from_pkey(nullptr, parameters, nullptr);
  EVP_PKEY_keygen_init(context);
  EVP_PKEY_keygen(context, &key);
  EVP_PKEY_CTX_free(context);
  EVP_PKEY_free(parameters);
  return KeyPtr(key);
}

// What a certificate says of itself.
struct Claims {
  long begin_s = -kHour;  // from now, as the next
  long expiry_s = kHour;
  const char* begin_text = nullptr;  // in place of the time
  const char* expiry_text = nullptr;
  EVP_PKEY* signer = nullptr;  // null: itself
};

std::string CertificatePem(EVP_PKEY* key, const Claims& claims = {}) {
  const X509Ptr certificate(X509_new());
  X509_set_version(certificate.get(), X509_VERSION_3);
  X509_set_pubkey(certificate.get(), key);
  X509_NAME* const name = X509_get_subject_name(certificate.get());
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>("localhost"), -1, -1, 0);
  X509_set_issuer_name(certificate.get(), name);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), claims.begin_s);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), claims.expiry_s);
  if (claims.begin_text != nullptr) ASN1_STRING_set(X509_getm_notBefore(certificate.get()), claims.begin_text, -1);
  if (claims.expiry_text != nullptr) ASN1_STRING_set(X509_getm_notAfter(certificate.get()), claims.expiry_text, -1);
  EVP_PKEY* const signer = claims.signer == nullptr ? key : claims.signer;
  const char* const type = EVP_PKEY_get0_type_name(signer);
  const bool own_digest = absl::string_view(type) == "ED25519" || absl::string_view(type) == "ED448";
  EXPECT_GT(X509_sign(certificate.get(), signer, own_digest ? nullptr : EVP_sha256()), 0);
  const BioPtr memory(BIO_new(BIO_s_mem()));
  PEM_write_bio_X509(memory.get(), certificate.get());
  return Pem(memory.get());
}

class CertificatesTest : public testing::Test {
 protected:
  void Write(const std::string& cert, const std::string& key) {
    folder_.Write("cert", cert);
    folder_.Write("key", key);
  }
  void Write(EVP_PKEY* key, const Claims& claims = {}) { Write(CertificatePem(key, claims), KeyPem(key)); }

  std::string Refusal() {
    const absl::Status status = Certificates::Load(files_).status();
    EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  }

  ScratchDirectory folder_;
  CertificateFiles files_{folder_.Path("cert"), folder_.Path("key"), ""};
  const KeyPtr key_ = EcKey();
};

TEST_F(CertificatesTest, TimesThatCannotBeReadAreRefused) {
  for (const char* nonsense : {"", "x", "nonsense", "991301000000Z", "99999999999999", "\xFF\xFF\xFF"}) {
    Write(key_.get(), {.expiry_text = nonsense});
    EXPECT_THAT(Refusal(), HasSubstr("no time that could be read as the end")) << nonsense;
    Write(key_.get(), {.begin_text = nonsense});
    EXPECT_THAT(Refusal(), HasSubstr("no time that could be read as the begin")) << nonsense;
  }
}

TEST_F(CertificatesTest, AReloadKeepsWhatServesWhenTimesCannotBeRead) {
  Write(key_.get());
  const auto certificates = Certificates::Load(files_).value();
  const auto served = certificates->current();
  Write(key_.get(), {.expiry_text = "nonsense"});
  EXPECT_TRUE(absl::IsInvalidArgument(certificates->Reload().status()));
  EXPECT_EQ(certificates->current(), served);
  // Said once, unless somebody asks.
  EXPECT_EQ(certificates->Reload().value(), false);
  EXPECT_TRUE(absl::IsInvalidArgument(certificates->Reload(/*again=*/true).status()));
  Write(key_.get());
  EXPECT_EQ(certificates->Reload().value(), true);
}

TEST_F(CertificatesTest, WhatIsNotValidYetIsRefusedUnlessBySeconds) {
  Write(key_.get(), {.begin_s = kHour, .expiry_s = 2 * kHour});
  EXPECT_THAT(Refusal(), HasSubstr("is not valid before"));
  Write(key_.get(), {.begin_s = 20});  // another machine's clock
  EXPECT_EQ(Refusal(), "");
  Write(key_.get(), {.expiry_s = -1});
  EXPECT_THAT(Refusal(), HasSubstr("has expired"));
}

TEST_F(CertificatesTest, KeysThatNoHandshakeCanUseAreRefused) {
  const KeyPtr dsa = DsaKey(), small = RsaKey(1024), curve = EcKey("secp256k1");
  for (EVP_PKEY* key : {dsa.get(), small.get(), curve.get()}) {
    Write(key);
    EXPECT_THAT(Refusal(), HasSubstr("serves no TLS connection"));
  }
  // An X25519 key cannot sign even its own certificate.
  const KeyPtr exchange = NamedKey("X25519");
  Write(exchange.get(), {.signer = key_.get()});
  EXPECT_THAT(Refusal(), HasSubstr("serves no TLS connection"));
}

TEST_F(CertificatesTest, KeysOfAllUsefulTypesAreTaken) {
  const KeyPtr rsa = RsaKey(2048), p384 = EcKey("P-384"), ed25519 = NamedKey("ED25519"), ed448 = NamedKey("ED448");
  for (EVP_PKEY* key : {key_.get(), rsa.get(), p384.get(), ed25519.get(), ed448.get()}) {
    Write(key);
    EXPECT_EQ(Refusal(), "");
  }
}

TEST_F(CertificatesTest, AChainIsTriedAsAWhole) {
  const std::string cert = CertificatePem(key_.get());
  const KeyPtr other = RsaKey(1024);
  Write(cert + CertificatePem(key_.get()), KeyPem(key_.get()));
  EXPECT_EQ(Refusal(), "");
  Write(cert + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", KeyPem(key_.get()));
  EXPECT_THAT(Refusal(), HasSubstr("a certificate of the chain"));
  Write(cert + CertificatePem(other.get()), KeyPem(key_.get()));
  EXPECT_THAT(Refusal(), HasSubstr("a certificate of the chain"));
}

TEST_F(CertificatesTest, AuthoritiesOfClientsAreAskedForInTheTrial) {
  Write(key_.get());
  const std::string authority = CertificatePem(key_.get());
  files_.client_ca = folder_.Write("ca", authority + authority);
  EXPECT_EQ(Refusal(), "");
}

TEST_F(CertificatesTest, WhatIsNoFileIsRefusedAtOnce) {
  Write(key_.get());
  files_.key = folder_.Path("fifo");
  ASSERT_EQ(mkfifo(files_.key.c_str(), 0600), 0);
  EXPECT_THAT(Refusal(), HasSubstr("is a FIFO"));
  files_.key = folder_.path();
  EXPECT_THAT(Refusal(), HasSubstr("is a directory"));
}

}  // namespace
}  // namespace dejavu
