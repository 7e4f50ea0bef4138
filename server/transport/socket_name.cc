#include "server/transport/socket_name.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace dejavu {
namespace {

// An IPv4 address that a socket of both kinds shows as ::ffff:a.b.c.d.
bool UnmapV4(const sockaddr_in6& address, sockaddr_in* v4) {
  if (!IN6_IS_ADDR_V4MAPPED(&address.sin6_addr)) return false;
  *v4 = {};
  v4->sin_family = AF_INET;
  v4->sin_port = address.sin6_port;
  std::memcpy(&v4->sin_addr, &address.sin6_addr.s6_addr[12], 4);
  return true;
}

struct Parts {
  bool v6 = false;
  in6_addr address = {};
  std::string host;
  int port = 0;
};

Parts PartsOf(const sockaddr_storage& storage) {
  Parts parts;
  char text[INET6_ADDRSTRLEN] = "";
  sockaddr_in v4 = {};
  sockaddr_in6 v6 = {};
  if (storage.ss_family == AF_INET6) {
    std::memcpy(&v6, &storage, sizeof(v6));
    parts.v6 = !UnmapV4(v6, &v4);
  } else {
    std::memcpy(&v4, &storage, sizeof(v4));
  }
  if (parts.v6) {
    inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof(text));
    parts.address = v6.sin6_addr;
    parts.port = ntohs(v6.sin6_port);
  } else {
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof(text));
    parts.port = ntohs(v4.sin_port);
  }
  parts.host = text;
  return parts;
}

std::string HostName(const Parts& parts) {
  return parts.v6 ? absl::StrCat("ipv6:%5B", parts.host, "%5D") : absl::StrCat("ipv4:", parts.host);
}

// As a range holds it.
std::array<uint8_t, 16> BytesOf(const sockaddr_storage& storage) {
  std::array<uint8_t, 16> bytes = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  if (storage.ss_family == AF_INET6) {
    std::memcpy(bytes.data(), &reinterpret_cast<const sockaddr_in6&>(storage).sin6_addr, 16);
  } else {
    std::memcpy(&bytes[12], &reinterpret_cast<const sockaddr_in&>(storage).sin_addr, 4);
  }
  return bytes;
}

bool ParseRange(absl::string_view text, AddressRange* range) {
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits('/', 1));
  in_addr v4;
  in6_addr v6;
  int most = 32;
  range->address = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  if (inet_pton(AF_INET, parts.first.c_str(), &v4) == 1) {
    std::memcpy(&range->address[12], &v4, 4);
  } else if (inet_pton(AF_INET6, parts.first.c_str(), &v6) == 1) {
    std::memcpy(range->address.data(), &v6, 16);
    most = 128;
  } else {
    return false;
  }
  int bits = most;
  if (text.find('/') != text.npos && (!absl::SimpleAtoi(parts.second, &bits) || bits < 0 || bits > most)) return false;
  range->bits = 128 - most + bits;
  return true;
}

bool Begins(const std::array<uint8_t, 16>& address, const AddressRange& range) {
  for (int bit = 0; bit < range.bits; ++bit) {
    const auto index = static_cast<size_t>(bit / 8);
    if (((address[index] ^ range.address[index]) >> (7 - bit % 8)) & 1) return false;
  }
  return true;
}

}  // namespace

std::string SocketName(const sockaddr_storage& address) {
  const Parts parts = PartsOf(address);
  return absl::StrCat(HostName(parts), ":", parts.port);
}

std::string AddressName(absl::string_view text) {
  if (text.size() >= INET6_ADDRSTRLEN || text.find('\0') != text.npos) return "";
  const std::string host(text);
  sockaddr_storage storage = {};
  sockaddr_in v4 = {};
  sockaddr_in6 v6 = {};
  if (inet_pton(AF_INET, host.c_str(), &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    std::memcpy(&storage, &v4, sizeof(v4));
  } else if (inet_pton(AF_INET6, host.c_str(), &v6.sin6_addr) == 1) {
    v6.sin6_family = AF_INET6;
    std::memcpy(&storage, &v6, sizeof(v6));
  } else {
    return "";
  }
  return HostName(PartsOf(storage));
}

std::string PeerName(const sockaddr_storage& address) {
  Parts parts = PartsOf(address);
  if (!parts.v6) return parts.host;
  std::memset(&parts.address.s6_addr[8], 0, 8);
  char text[INET6_ADDRSTRLEN] = "";
  inet_ntop(AF_INET6, &parts.address, text, sizeof(text));
  return absl::StrCat(text, "/64");
}

absl::StatusOr<std::vector<AddressRange>> ParseAddressRanges(const char* option, absl::string_view list) {
  std::vector<AddressRange> ranges;
  for (absl::string_view part : absl::StrSplit(list, ',', absl::SkipWhitespace())) {
    part = absl::StripAsciiWhitespace(part);
    AddressRange range;
    if (!ParseRange(part, &range)) {
      return absl::InvalidArgumentError(absl::StrCat(
          option, " names ", part, "; it must be an IP address, or one with the bits that count: 10.0.0.0/8"));
    }
    ranges.push_back(range);
  }
  return ranges;
}

bool IsIn(const sockaddr_storage& address, const std::vector<AddressRange>& ranges) {
  const std::array<uint8_t, 16> bytes = BytesOf(address);
  return std::any_of(ranges.begin(), ranges.end(), [&](const AddressRange& range) { return Begins(bytes, range); });
}

}  // namespace dejavu
