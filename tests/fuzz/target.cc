#include "tests/fuzz/target.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "kernels/base/utf8.h"

namespace dejavu {

void CheckAnswer(const absl::Status& status, const std::vector<absl::StatusCode>& codes, size_t max_bytes) {
  if (status.ok()) return;
  const absl::string_view message = status.message();
  CHECK(std::count(codes.begin(), codes.end(), status.code()) == 1) << status;
  CHECK(!message.empty()) << "a refusal without a reason";
  CHECK(message.size() <= max_bytes) << "a message of " << message.size() << " bytes: " << message.substr(0, 400);
  const bool printable = IsValidUtf8(message) && std::none_of(message.begin(), message.end(), [](char c) {
                           return (static_cast<unsigned char>(c) < 0x20 && c != '\n') || c == 0x7F;
                         });
  CHECK(printable) << "a message that no log takes: " << absl::CHexEscape(message);
}

}  // namespace dejavu
