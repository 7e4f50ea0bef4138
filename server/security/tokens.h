// Tokens: who may call, from a file of lines `tenant:sha256` (64 hexadecimal digits, of the token's bytes). Empty lines
// and those that begin with # say nothing; a tenant may have several tokens. Any thread.
#ifndef SERVER_SECURITY_TOKENS_H_
#define SERVER_SECURITY_TOKENS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/mutex.h"

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

  // Reads the file again: true where it has changed and what it says holds now. After an error the old lines hold on;
  // the same text is not complained of twice, unless `again`.
  absl::StatusOr<bool> Reload(bool again = false);

  size_t size() const { return lines()->size(); }

 private:
  struct Line {
    std::string tenant;
    std::array<uint8_t, 32> hash;
  };
  using Lines = std::vector<Line>;

  explicit Tokens(std::string path) : path_(std::move(path)) {}

  static absl::StatusOr<Lines> Parse(const std::string& path, const std::string& text);
  std::shared_ptr<const Lines> lines() const {
    MutexLock lock(mutex_);
    return lines_;
  }

  const std::string path_;
  // What was looked at last, good or not. Load's and Reload's.
  std::optional<std::string> text_;
  bool usable_ = false;

  mutable Mutex mutex_;
  std::shared_ptr<const Lines> lines_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_SECURITY_TOKENS_H_
