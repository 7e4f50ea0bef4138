#include "server/security/tokens.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status_macros.h"
#include "server/security/small_file.h"

namespace dejavu {
namespace {

constexpr absl::string_view kLineForm = "it must be TENANT:SHA256, the hash in 64 hexadecimal digits";

}  // namespace

bool IsTenantName(absl::string_view name) {
  const auto fits = [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  };
  return name.size() <= kMaxTenantBytes && std::all_of(name.begin(), name.end(), fits);
}

absl::StatusOr<Tokens::Lines> Tokens::Parse(const std::string& path, const std::string& text) {
  Lines lines;
  absl::flat_hash_map<std::string, std::string> owners;  // by hash
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    const auto refuse = [&](absl::string_view problem) {
      return absl::InvalidArgumentError(absl::StrCat("auth.tokens_file ", path, ", line ", number, ": ", problem));
    };
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    const size_t colon = line.find(':');
    if (colon == line.npos || colon == 0) return refuse(kLineForm);
    Line entry;
    entry.tenant = std::string(line.substr(0, colon));
    if (!IsTenantName(entry.tenant)) return refuse("a tenant is at most 64 of A-Z, a-z, 0-9, '.', '_' and '-'");
    const absl::string_view digits = line.substr(colon + 1);
    const bool hex = std::all_of(digits.begin(), digits.end(), [](char c) { return absl::ascii_isxdigit(c); });
    if (digits.size() != 2 * entry.hash.size() || !hex) return refuse(kLineForm);
    const std::string hash = absl::HexStringToBytes(digits);
    std::copy(hash.begin(), hash.end(), entry.hash.begin());
    const auto [owner, fresh] = owners.emplace(hash, entry.tenant);
    if (!fresh && owner->second != entry.tenant) return refuse("another tenant has the same token");
    lines.push_back(std::move(entry));
  }
  if (!lines.empty()) return lines;
  return absl::InvalidArgumentError(absl::StrCat("auth.tokens_file ", path, " holds no token: nobody could call"));
}

absl::StatusOr<std::unique_ptr<Tokens>> Tokens::Load(const std::string& path) {
  std::unique_ptr<Tokens> tokens(new Tokens(path));
  RETURN_IF_ERROR(tokens->Reload().status());
  return tokens;
}

absl::StatusOr<bool> Tokens::Reload(bool again) {
  ASSIGN_OR_RETURN(std::string text, ReadSmallFile("auth.tokens_file", path_, kMaxFileBytes));
  if (text == text_ && (usable_ || !again)) return false;
  text_ = std::move(text);
  usable_ = false;
  ASSIGN_OR_RETURN(Lines lines, Parse(path_, *text_));
  usable_ = true;
  auto shared = std::make_shared<const Lines>(std::move(lines));
  MutexLock lock(mutex_);
  lines_ = std::move(shared);
  return true;
}

std::optional<std::string> Tokens::TenantOf(absl::string_view token) const {
  std::array<uint8_t, 32> hash;
  SHA256(reinterpret_cast<const uint8_t*>(token.data()), token.size(), hash.data());
  const std::shared_ptr<const Lines> all = lines();
  size_t found = all->size();
  for (size_t i = 0; i < all->size(); ++i) {
    const bool same = CRYPTO_memcmp((*all)[i].hash.data(), hash.data(), hash.size()) == 0;
    found = same ? i : found;
  }
  if (found == all->size()) return std::nullopt;
  return (*all)[found].tenant;
}

}  // namespace dejavu
