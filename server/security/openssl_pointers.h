// Owners of OpenSSL's objects, and PEM texts as OpenSSL reads them. Any thread.
#ifndef SERVER_SECURITY_OPENSSL_POINTERS_H_
#define SERVER_SECURITY_OPENSSL_POINTERS_H_

#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <memory>
#include <string>

namespace dejavu {

template <typename T, void (*kFree)(T*)>
struct OpensslFree {
  void operator()(T* object) const { kFree(object); }
};
using X509Ptr = std::unique_ptr<X509, OpensslFree<X509, X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, OpensslFree<EVP_PKEY, EVP_PKEY_free>>;
using BioPtr = std::unique_ptr<BIO, OpensslFree<BIO, BIO_free_all>>;

// `text` must outlive it.
inline BioPtr PemReader(const std::string& text) {
  return BioPtr(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}
// Nobody is asked for the passphrase of what is encrypted.
inline int NoPassphrase(char*, int, int, void*) { return -1; }
// Null where there is no further one. OpenSSL's error queue says why.
inline X509Ptr NextCertificate(BIO* reader) {
  return X509Ptr(PEM_read_bio_X509(reader, nullptr, NoPassphrase, nullptr));
}
inline KeyPtr PrivateKeyFrom(const std::string& text) {
  const BioPtr reader = PemReader(text);
  return KeyPtr(PEM_read_bio_PrivateKey(reader.get(), nullptr, NoPassphrase, nullptr));
}

}  // namespace dejavu

#endif  // SERVER_SECURITY_OPENSSL_POINTERS_H_
