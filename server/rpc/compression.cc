#include "server/rpc/compression.h"

#include <zlib.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

constexpr int64_t kPieceBytes = 256 << 10;
constexpr int kAnyWrapping = 15 + 32;  // the largest window; gzip's header or zlib's, whichever is there

// Which algorithm a buffer was compressed with is told to those who derive from the reader.
class CompressionReader final : public grpc::ProtoBufferReader {
 public:
  using ProtoBufferReader::ProtoBufferReader;
  bool compressed() { return reader()->buffer_in->data.raw.compression != GRPC_COMPRESS_NONE; }
};

absl::Status Damaged() {
  return absl::InvalidArgumentError("the request is compressed, and is no whole gzip or deflate data");
}

class Inflater {
 public:
  explicit Inflater(int64_t most_bytes) : most_bytes_(most_bytes) {
    CHECK(inflateInit2(&stream_, kAnyWrapping) == Z_OK) << "zlib cannot start";
  }
  ~Inflater() { inflateEnd(&stream_); }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  absl::Status Add(const grpc::Slice& slice) {
    stream_.next_in = const_cast<Bytef*>(slice.begin());
    stream_.avail_in = static_cast<uInt>(slice.size());
    // What has come may have more behind it than there was room for.
    while (stream_.avail_in > 0 || (stream_.avail_out == 0 && !ended_)) {
      if (ended_) return Damaged();
      if (stream_.avail_out == 0 && !Extend()) return TooLarge();
      const int result = inflate(&stream_, Z_NO_FLUSH);
      ended_ = result == Z_STREAM_END;
      if (!ended_ && result != Z_OK && result != Z_BUF_ERROR) return Damaged();
    }
    return absl::OkStatus();
  }

  absl::StatusOr<grpc::ByteBuffer> Take() {
    if (!ended_) return Damaged();
    if (static_cast<int64_t>(stream_.total_out) > most_bytes_) return TooLarge();
    pieces_.back() = pieces_.back().sub(0, pieces_.back().size() - stream_.avail_out);
    return grpc::ByteBuffer(pieces_.data(), pieces_.size());
  }

 private:
  absl::Status TooLarge() const { return MessageTooLarge("has more bytes when it is decompressed", most_bytes_); }

  // There is room for one byte more than may come, so that all that may come finds its end.
  bool Extend() {
    const int64_t bytes = std::min(kPieceBytes, most_bytes_ + 1 - static_cast<int64_t>(stream_.total_out));
    if (bytes <= 0) return false;
    pieces_.emplace_back(static_cast<size_t>(bytes));
    stream_.next_out = const_cast<Bytef*>(pieces_.back().begin());
    stream_.avail_out = static_cast<uInt>(bytes);
    return true;
  }

  const int64_t most_bytes_;
  z_stream stream_ = {};
  bool ended_ = false;
  std::vector<grpc::Slice> pieces_;
};

}  // namespace

bool IsCompressed(const grpc::ByteBuffer& bytes) {
  grpc::ByteBuffer readable = bytes;  // shares the slices
  CompressionReader reader(&readable);
  return reader.status().ok() && reader.compressed();
}

absl::StatusOr<grpc::ByteBuffer> Decompress(const grpc::ByteBuffer& bytes, int64_t most_bytes) {
  std::vector<grpc::Slice> slices;
  if (!bytes.Dump(&slices).ok()) return Damaged();
  Inflater inflater(most_bytes);
  for (const grpc::Slice& slice : slices) RETURN_IF_ERROR(inflater.Add(slice));
  return inflater.Take();
}

absl::Status MessageTooLarge(absl::string_view what, int64_t most_bytes) {
  return WithErrorInfo(absl::ResourceExhaustedError(absl::StrCat("the request ", what, "; at most ", most_bytes,
                                                                 " are taken (transport.max_message_bytes)")),
                       "MESSAGE_TOO_LARGE");
}

}  // namespace dejavu
