// Tokens: who may call, and how much, from a file of lines `tenant:sha256` (64 hexadecimal digits, of the token's
// bytes), each perhaps followed by settings (tenant_limits.h). Empty lines and those that begin with # say nothing; a
// tenant may have several tokens, whose lines must not contradict each other. Any thread.
#ifndef SERVER_SECURITY_TOKENS_H_
#define SERVER_SECURITY_TOKENS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/mutex.h"
#include "server/security/tenant_limits.h"

namespace dejavu {

// A tenant is named by at most so many of A-Z, a-z, 0-9, '.', '_' and '-'; the empty name is nobody's in particular.
inline constexpr size_t kMaxTenantBytes = 64;
bool IsTenantName(absl::string_view name);

class Tokens {
 public:
  static constexpr size_t kMaxFileBytes = 1 << 20;
  static constexpr size_t kMaxTokenBytes = 4096;  // of what a client sends

  // INVALID_ARGUMENT names the file and the line, never what it holds.
  static absl::StatusOr<std::unique_ptr<Tokens>> Load(const std::string& path);

  // Whose token that is. Takes the same time whichever line it is, or none.
  std::optional<std::string> TenantOf(absl::string_view token) const;

  // What the file says of the tenant; of a stranger no limits.
  TenantLimits LimitsOf(const std::string& tenant) const;

  // Reads the file again: true where it has changed and what it says holds now. After an error the old lines hold on;
  // the same text is not complained of twice, unless `again`.
  absl::StatusOr<bool> Reload(bool again = false);

  size_t size() const { return content()->lines.size(); }

 private:
  struct Line {
    std::string tenant;
    std::array<uint8_t, 32> hash;
  };
  struct Content {
    std::vector<Line> lines;
    absl::flat_hash_map<std::string, TenantLimits> limits;  // by tenant
  };

  explicit Tokens(std::string path) : path_(std::move(path)) {}

  static absl::StatusOr<Content> Parse(const std::string& path, const std::string& text);
  static absl::StatusOr<Line> ParseLine(absl::string_view text);
  std::shared_ptr<const Content> content() const {
    MutexLock lock(mutex_);
    return content_;
  }

  const std::string path_;
  // What was looked at last, good or not. Load's and Reload's.
  std::optional<std::string> text_;
  bool usable_ = false;

  mutable Mutex mutex_;
  std::shared_ptr<const Content> content_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_SECURITY_TOKENS_H_
