#include "server/security/security.h"

#include <chrono>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

bool IsLoopback(const std::string& listen) {
  const std::string host = listen.substr(0, listen.rfind(':'));
  return host == "localhost" || host == "[::1]" ||
         (absl::StartsWith(host, "127.") && host.find_first_not_of("0123456789.") == host.npos);
}

absl::Status CheckPlaintext(const char* option, const std::string& listen) {
  if (listen.empty() || IsLoopback(listen)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is ", listen,
                   ": tokens would cross the network in plain text; set tls.cert and tls.key, or auth.allow_plaintext "
                   "where something else protects the connections"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Security>> Security::Load(const ServerOptions& options) {
  std::unique_ptr<Security> security(new Security(options));
  const bool tls = !options.tls_cert.empty() || !options.tls_key.empty();
  if (tls) {
    ASSIGN_OR_RETURN(security->certificates_,
                     Certificates::Load({options.tls_cert, options.tls_key, options.tls_client_ca}));
  } else if (!options.tls_client_ca.empty()) {
    return absl::InvalidArgumentError("tls.client_ca needs tls.cert and tls.key");
  }
  if (!options.auth_tokens_file.empty()) {
    if (!tls && !options.auth_allow_plaintext) {
      RETURN_IF_ERROR(CheckPlaintext("listen", options.listen));
      RETURN_IF_ERROR(CheckPlaintext("admin.listen", options.admin_listen));
    }
    ASSIGN_OR_RETURN(security->tokens_, Tokens::Load(options.auth_tokens_file));
  }
  if (tls || security->tokens_ != nullptr) {
    security->thread_ = std::thread([raw = security.get()] { raw->Run(); });
  }
  return security;
}

Security::~Security() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
  }
  wake_.NotifyAll();
  thread_.join();
}

std::shared_ptr<grpc::ServerCredentials> Security::CredentialsForPort() {
  return certificates_ == nullptr ? grpc::InsecureServerCredentials() : certificates_->ForPort();
}

void Security::LookNow() {
  if (!thread_.joinable()) {
    spdlog::info("there are no certificates and no tokens to read again");
    return;
  }
  MutexLock lock(mutex_);
  asked_ = true;
  wake_.NotifyAll();
}

void Security::Run() {
  const SteadyTime::duration every = Lasting(options_.tls_reload_s);
  while (true) {
    const auto next = std::chrono::steady_clock::now() + every;
    bool asked = false;
    {
      MutexLock lock(mutex_);
      while (!stopping_ && !asked_ && wake_.WaitUntil(mutex_, next)) {
      }
      if (stopping_) return;
      asked = std::exchange(asked_, false);
    }
    if (certificates_ != nullptr) Note("certificates", asked, certificates_->Reload(asked));
    if (tokens_ != nullptr) Note("tokens", asked, tokens_->Reload(asked));
  }
}

void Security::Note(const char* what, bool asked, const absl::StatusOr<bool>& changed) {
  if (!changed.ok()) {
    failures_.fetch_add(1, std::memory_order_relaxed);
    spdlog::error("the {} stay as they were: {}", what, std::string(changed.status().message()));
  } else if (*changed) {
    reloads_.fetch_add(1, std::memory_order_relaxed);
    spdlog::info("the {} have changed; new connections and calls see them", what);
  } else if (asked) {
    spdlog::info("the {} were read again and have not changed", what);
  }
}

}  // namespace dejavu
