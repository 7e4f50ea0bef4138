#include "server/security/handshake_trial.h"

#include <openssl/err.h>
#include <openssl/ssl.h>

#include <memory>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/security/openssl_pointers.h"

namespace dejavu {
namespace {

using ContextPtr = std::unique_ptr<SSL_CTX, OpensslFree<SSL_CTX, SSL_CTX_free>>;
using SslPtr = std::unique_ptr<SSL, OpensslFree<SSL, SSL_free>>;

constexpr char kCiphers[] = "ECDHE+AESGCM";  // gRPC's, below TLS 1.3
constexpr int kMostRounds = 20;              // a handshake takes three

absl::Status Failure(absl::string_view step) {
  const unsigned long error = ERR_get_error();
  const char* const reason = error == 0 ? nullptr : ERR_reason_error_string(error);
  ERR_clear_error();
  return absl::InvalidArgumentError(absl::StrCat(step, ": ", reason == nullptr ? "no reason is known" : reason));
}

// The server's own certificate and those that lead from it to an authority, in the order of the file.
absl::Status UseChain(const std::string& cert, SSL_CTX* context) {
  const BioPtr reader = PemReader(cert);
  const X509Ptr own = NextCertificate(reader.get());
  if (own == nullptr || SSL_CTX_use_certificate(context, own.get()) != 1) return Failure("the certificate");
  while (X509Ptr next = NextCertificate(reader.get())) {
    if (SSL_CTX_add0_chain_cert(context, next.get()) != 1) return Failure("a certificate of the chain");
    next.release();  // the context's
  }
  const unsigned long end = ERR_peek_last_error();
  if (ERR_GET_LIB(end) != ERR_LIB_PEM || ERR_GET_REASON(end) != PEM_R_NO_START_LINE) {
    return Failure("a certificate of the chain");
  }
  ERR_clear_error();
  return absl::OkStatus();
}

// Clients are asked for a certificate of these authorities. The trial's has none, which is fine here.
absl::Status AskForClients(const std::string& client_ca, SSL_CTX* context) {
  const BioPtr reader = PemReader(client_ca);
  while (const X509Ptr authority = NextCertificate(reader.get())) {
    if (SSL_CTX_add_client_CA(context, authority.get()) != 1) return Failure("an authority of clients");
  }
  ERR_clear_error();
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER, [](int, X509_STORE_CTX*) { return 1; });
  return absl::OkStatus();
}

absl::StatusOr<ContextPtr> ServerContext(const std::string& cert, const std::string& key,
                                         const std::string& client_ca) {
  ContextPtr context(SSL_CTX_new(TLS_server_method()));
  if (context == nullptr) return Failure("a server");
  SSL_CTX_set_min_proto_version(context.get(), TLS1_2_VERSION);
  SSL_CTX_set_max_proto_version(context.get(), TLS1_3_VERSION);
  if (SSL_CTX_set_cipher_list(context.get(), kCiphers) != 1) return Failure("the ciphers");
  RETURN_IF_ERROR(UseChain(cert, context.get()));
  const KeyPtr private_key = PrivateKeyFrom(key);
  if (private_key == nullptr || SSL_CTX_use_PrivateKey(context.get(), private_key.get()) != 1) {
    return Failure("the key");
  }
  if (!client_ca.empty()) RETURN_IF_ERROR(AskForClients(client_ca, context.get()));
  return context;
}

// One end, which reads and writes pipes in memory.
SslPtr MakeEnd(SSL_CTX* context, BioPtr pipe) {
  SslPtr end(SSL_new(context));
  if (end == nullptr) return nullptr;
  SSL_set_bio(end.get(), pipe.get(), pipe.get());  // takes it
  pipe.release();
  return end;
}

// True once the end is through; false while it waits for the other one.
absl::StatusOr<bool> Advance(SSL* end) {
  const int result = SSL_do_handshake(end);
  if (result == 1) return true;
  const int error = SSL_get_error(end, result);
  if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) return false;
  return Failure("the handshake");
}

absl::Status ShakeHands(SSL* server, SSL* client) {
  SSL_set_accept_state(server);
  SSL_set_connect_state(client);
  for (int round = 0; round < kMostRounds; ++round) {
    ASSIGN_OR_RETURN(const bool client_done, Advance(client));
    ASSIGN_OR_RETURN(const bool server_done, Advance(server));
    if (client_done && server_done) return absl::OkStatus();
  }
  return absl::InvalidArgumentError("the handshake: it does not come to an end");
}

}  // namespace

absl::Status TryHandshake(const std::string& cert, const std::string& key, const std::string& client_ca) {
  ERR_clear_error();
  ASSIGN_OR_RETURN(const ContextPtr server_context, ServerContext(cert, key, client_ca));
  const ContextPtr client_context(SSL_CTX_new(TLS_client_method()));  // of no authority: it takes any certificate
  BIO* server_pipe = nullptr;
  BIO* client_pipe = nullptr;
  if (client_context == nullptr || BIO_new_bio_pair(&server_pipe, 0, &client_pipe, 0) != 1) return Failure("a client");
  const SslPtr server = MakeEnd(server_context.get(), BioPtr(server_pipe));
  const SslPtr client = MakeEnd(client_context.get(), BioPtr(client_pipe));
  if (server == nullptr || client == nullptr) return Failure("a connection");
  const absl::Status status = ShakeHands(server.get(), client.get());
  ERR_clear_error();
  return status;
}

}  // namespace dejavu
