// Random bits for ids and seeds, from a cryptographic source: who sees some of them can guess no others. Any thread.
#ifndef SERVER_RPC_RANDOM_H_
#define SERVER_RPC_RANDOM_H_

#include <cstdint>
#include <string>

namespace dejavu {

uint64_t RandomBits();

double RandomShare();  // [0, 1)

// So many random hexadecimal digits, not all of them 0.
std::string RandomHex(int digits);

}  // namespace dejavu

#endif  // SERVER_RPC_RANDOM_H_
