// HandshakeTrial: whether a certificate and its key can serve, found out by serving. A TLS server with them, set up as
// gRPC sets up its own, shakes hands with a client in memory. No list of key types, sizes and signatures can be wrong
// that way. Any thread.
#ifndef SERVER_SECURITY_HANDSHAKE_TRIAL_H_
#define SERVER_SECURITY_HANDSHAKE_TRIAL_H_

#include <string>

#include "absl/status/status.h"

namespace dejavu {

// PEM texts. `client_ca` may be empty; otherwise its names are sent to the client, as authorities that are asked for.
// INVALID_ARGUMENT with OpenSSL's reason.
absl::Status TryHandshake(const std::string& cert, const std::string& key, const std::string& client_ca);

}  // namespace dejavu

#endif  // SERVER_SECURITY_HANDSHAKE_TRIAL_H_
