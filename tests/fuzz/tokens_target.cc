// A file of tokens, and who a token belongs to: the file says so in plain text, or nobody.
#include <openssl/sha.h>

#include <memory>
#include <optional>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/security/tokens.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

std::string HexHash(absl::string_view token) {
  std::string hash(32, '\0');
  SHA256(reinterpret_cast<const uint8_t*>(token.data()), token.size(), reinterpret_cast<uint8_t*>(hash.data()));
  return absl::BytesToHexString(hash);
}

// The file, with the hash of the token wherever it says $.
void Run(absl::string_view bytes) {
  FuzzInput input(bytes);
  const absl::string_view token = input.Section();
  std::string text;
  for (const char c : input.Rest()) c == '$' ? absl::StrAppend(&text, HexHash(token)) : text.push_back(c);

  static const FuzzFiles& files = *new FuzzFiles;
  const std::string path = files.Write("tokens", text);
  const absl::StatusOr<std::unique_ptr<Tokens>> tokens = Tokens::Load(path);
  CheckAnswer(tokens.status(), {absl::StatusCode::kInvalidArgument});
  if (!tokens.ok()) {
    CHECK(!absl::StrContains(tokens.status().message(), HexHash(token))) << "a hash in a message";
    return;
  }
  CHECK((*tokens)->size() > 0) << "tokens of nobody";
  const std::optional<std::string> tenant = (*tokens)->TenantOf(token);
  if (tenant.has_value()) {
    CHECK(!tenant->empty() && IsTenantName(*tenant)) << *tenant;
    const std::string line = absl::StrCat(*tenant, ":", HexHash(token));
    CHECK(absl::StrContains(absl::AsciiStrToLower(text), absl::AsciiStrToLower(line)))
        << "the file has no line " << line;
  }
  const TenantLimits limits = (*tokens)->LimitsOf(tenant.value_or("nobody"));
  for (const auto& quota : {limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_requests}) {
    CHECK(!quota.has_value() || (*quota >= 1 && *quota <= kMaxTenantQuota)) << *quota;
  }
  CHECK(limits.best() <= limits.worst()) << "a tenant that no tier serves";
  CHECK(!(*tokens)->TenantOf(absl::StrCat(token, "x")).has_value()) << "a token that nobody has";
  CHECK(!*(*tokens)->Reload()) << "a file that has not changed";
}

}  // namespace

FuzzTarget TokensTarget() {
  const std::string other = HexHash("other"), third = HexHash("third");
  return {"tokens",
          2048,
          Run,
          {"secret\x1e"
           "alice:$\n",
           absl::StrCat("secret\x1e# who may call\n\nalice:$\r\n  bob:", other, "  \nalice:", third, "\n"),
           absl::StrCat("secret\x1e", "bob:$\nalice:$\n"), "\x1e:$", absl::StrCat("x\x1e", "a:", other.substr(1)),
           absl::StrCat("secret\x1e", "bob:$ requests_per_minute=60 highest_tier=exact\nbob:", other,
                        "\ttokens_per_minute=1000 concurrent_requests=2 lowest_tier=fast\n")},
          {"$", ":", "\n", "\r\n", "#", "alice:$", "operators:$", "bob", " requests_per_minute=", " tokens_per_minute=",
           " concurrent_requests=", " highest_tier=dense", " lowest_tier=exact", "1000000000000", "0", "="}};
}

}  // namespace dejavu
