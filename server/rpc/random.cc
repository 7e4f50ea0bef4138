#include "server/rpc/random.h"

#include <random>

namespace dejavu {
namespace {

std::mt19937_64& Generator() {
  thread_local std::mt19937_64 generator{(uint64_t{std::random_device{}()} << 32) | std::random_device{}()};
  return generator;
}

}  // namespace

uint64_t RandomBits() { return Generator()(); }

double RandomShare() { return std::uniform_real_distribution<double>()(Generator()); }

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
