#include "server/security/tokens.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status_macros.h"
#include "server/security/small_file.h"

namespace dejavu {
namespace {

constexpr absl::string_view kLineForm = "it must begin with TENANT:SHA256, the hash in 64 hexadecimal digits";

}  // namespace

bool IsTenantName(absl::string_view name) {
  const auto fits = [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  };
  return name.size() <= kMaxTenantBytes && std::all_of(name.begin(), name.end(), fits);
}

// What stands before the settings.
absl::StatusOr<Tokens::Line> Tokens::ParseLine(absl::string_view text) {
  const size_t colon = text.find(':');
  if (colon == text.npos || colon == 0) return absl::InvalidArgumentError(kLineForm);
  Line line;
  line.tenant = std::string(text.substr(0, colon));
  if (!IsTenantName(line.tenant)) {
    return absl::InvalidArgumentError("a tenant is at most 64 of A-Z, a-z, 0-9, '.', '_' and '-'");
  }
  const absl::string_view digits = text.substr(colon + 1);
  const bool hex = std::all_of(digits.begin(), digits.end(), [](char c) { return absl::ascii_isxdigit(c); });
  if (digits.size() != 2 * line.hash.size() || !hex) return absl::InvalidArgumentError(kLineForm);
  const std::string hash = absl::HexStringToBytes(digits);
  std::copy(hash.begin(), hash.end(), line.hash.begin());
  return line;
}

absl::StatusOr<Tokens::Content> Tokens::Parse(const std::string& path, const std::string& text) {
  Content content;
  absl::flat_hash_map<std::array<uint8_t, 32>, std::string> owners;  // by hash
  int number = 0;
  for (absl::string_view text_line : absl::StrSplit(text, '\n')) {
    ++number;
    const auto refuse = [&](absl::string_view problem) {
      return absl::InvalidArgumentError(absl::StrCat("auth.tokens_file ", path, ", line ", number, ": ", problem));
    };
    text_line = absl::StripAsciiWhitespace(text_line);
    if (text_line.empty() || text_line[0] == '#') continue;
    const size_t end = std::min(text_line.find_first_of(" \t"), text_line.size());
    absl::StatusOr<Line> line = ParseLine(text_line.substr(0, end));
    if (!line.ok()) return refuse(line.status().message());
    const auto [owner, fresh] = owners.emplace(line->hash, line->tenant);
    if (!fresh && owner->second != line->tenant) return refuse("another tenant has the same token");
    const absl::Status settings = content.limits[line->tenant].Add(text_line.substr(end));
    if (!settings.ok()) return refuse(settings.message());
    content.lines.push_back(*std::move(line));
  }
  if (!content.lines.empty()) return content;
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
  ASSIGN_OR_RETURN(Content content, Parse(path_, *text_));
  usable_ = true;
  auto shared = std::make_shared<const Content>(std::move(content));
  MutexLock lock(mutex_);
  content_ = std::move(shared);
  return true;
}

std::optional<std::string> Tokens::TenantOf(absl::string_view token) const {
  std::array<uint8_t, 32> hash;
  SHA256(reinterpret_cast<const uint8_t*>(token.data()), token.size(), hash.data());
  const std::shared_ptr<const Content> now = content();
  const std::vector<Line>& lines = now->lines;
  size_t found = lines.size();
  for (size_t i = 0; i < lines.size(); ++i) {
    const bool same = CRYPTO_memcmp(lines[i].hash.data(), hash.data(), hash.size()) == 0;
    found = same ? i : found;
  }
  if (found == lines.size()) return std::nullopt;
  return lines[found].tenant;
}

TenantLimits Tokens::LimitsOf(const std::string& tenant) const {
  const std::shared_ptr<const Content> now = content();
  const auto found = now->limits.find(tenant);
  return found == now->limits.end() ? TenantLimits() : found->second;
}

}  // namespace dejavu
