// SHA-256 of a stream of bytes, by OpenSSL.
#ifndef ENGINE_FORMATS_SHA256_H_
#define ENGINE_FORMATS_SHA256_H_

#include <openssl/evp.h>

#include <array>
#include <cstddef>
#include <memory>
#include <new>

#include "absl/strings/string_view.h"
#include "kernels/base/check.h"

namespace dejavu {

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (context_ == nullptr) throw std::bad_alloc();
    Start();
  }
  void Add(const void* data, size_t bytes) { CHECK(EVP_DigestUpdate(context_.get(), data, bytes) == 1) << "SHA-256"; }
  void Add(absl::string_view text) { Add(text.data(), text.size()); }

  // Of what has been added; the next one starts from nothing.
  std::array<unsigned char, 32> Digest() {
    std::array<unsigned char, 32> digest;
    CHECK(EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) == 1) << "SHA-256";
    Start();
    return digest;
  }

 private:
  void Start() { CHECK(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1) << "SHA-256"; }

  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace dejavu

#endif  // ENGINE_FORMATS_SHA256_H_
