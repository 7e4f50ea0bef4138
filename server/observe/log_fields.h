// LogFields: collects the keys and values of a structured line, as text or as JSON. One thread.
#ifndef SERVER_OBSERVE_LOG_FIELDS_H_
#define SERVER_OBSERVE_LOG_FIELDS_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace dejavu {

enum class LogFormat { kText, kJson };

// Values may hold any bytes.
class LogFields {
 public:
  explicit LogFields(LogFormat format) : format_(format) {}

  LogFields& Text(absl::string_view key, absl::string_view value);
  LogFields& Count(absl::string_view key, int64_t value);
  LogFields& Unsigned(absl::string_view key, uint64_t value);
  LogFields& Number(absl::string_view key, double value, int decimals);  // left out unless finite

  const std::string& text() const { return text_; }  // `a=1 b="x y"` or `"a":1,"b":"x y"`

 private:
  void Key(absl::string_view key);

  const LogFormat format_;
  std::string text_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_LOG_FIELDS_H_
