#include "server/rpc/random.h"

#include <openssl/rand.h>

#include <array>
#include <utility>

#include "kernels/base/check.h"

namespace dejavu {
namespace {

// Some at a time: a draw of OpenSSL's takes its locks.
class Buffer {
 public:
  uint64_t Next() {
    if (left_ == 0) {
      // It fails only where the system has no source of randomness at all, which no caller can bring about. Ids that
      // can be guessed are no way out.
      CHECK(RAND_bytes(reinterpret_cast<unsigned char*>(bits_.data()), sizeof(bits_)) == 1) << "RAND_bytes";
      left_ = bits_.size();
    }
    return std::exchange(bits_[--left_], 0);
  }

 private:
  std::array<uint64_t, 32> bits_ = {};
  size_t left_ = 0;
};

}  // namespace

uint64_t RandomBits() {
  thread_local Buffer buffer;
  return buffer.Next();
}

double RandomShare() { return static_cast<double>(RandomBits() >> 11) * 0x1p-53; }

std::string RandomHex(int digits) {
  std::string text(static_cast<size_t>(digits), '0');
  while (text.find_first_not_of('0') == text.npos) {
    uint64_t bits = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      if (i % 16 == 0) bits = RandomBits();
      text[i] = "0123456789abcdef"[bits & 15];
      bits >>= 4;
    }
  }
  return text;
}

}  // namespace dejavu
