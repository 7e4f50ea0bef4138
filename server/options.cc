#include "server/options.h"

#include "absl/strings/numbers.h"

namespace dejavu {

bool IsHostAndPort(absl::string_view address) {
  const size_t colon = address.rfind(':');
  if (colon == address.npos) return false;
  const absl::string_view host = address.substr(0, colon), port = address.substr(colon + 1);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (host.empty() || (!bracketed && host.find_first_of(": []/") != host.npos)) return false;
  uint32_t number = 0;
  return !port.empty() && port.find_first_not_of("0123456789") == port.npos && absl::SimpleAtoi(port, &number) &&
         number <= 65535;
}

}  // namespace dejavu
