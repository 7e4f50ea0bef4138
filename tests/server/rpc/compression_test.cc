#include "server/rpc/compression.h"

#include <zlib.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

constexpr int kGzip = 15 + 16, kDeflate = 15;

std::string Compressed(const std::string& text, int wrapping) {
  z_stream stream = {};
  EXPECT_EQ(deflateInit2(&stream, Z_BEST_COMPRESSION, Z_DEFLATED, wrapping, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

// In slices of at most so many bytes.
grpc::ByteBuffer Buffer(const std::string& bytes, size_t slice_bytes) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size(); at += slice_bytes) slices.emplace_back(bytes.substr(at, slice_bytes));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::string Text(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string text;
  for (const grpc::Slice& slice : slices) text.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return text;
}

TEST(Decompress, GivesBackWhatWasCompressedUpToItsLimit) {
  std::mt19937 random(3);
  for (const size_t size :
       {size_t{0}, size_t{1}, size_t{300}, size_t{256} << 10, (size_t{256} << 10) + 1, size_t{1} << 20}) {
    std::string noise(size, 'a');
    std::generate(noise.begin(), noise.end(), [&] { return static_cast<char>(random()); });
    for (const std::string& text : {std::string(size, 'a'), noise}) {
      for (const int wrapping : {kGzip, kDeflate}) {
        for (const size_t slice_bytes : {size_t{1000}, size_t{1} << 30}) {
          const grpc::ByteBuffer compressed = Buffer(Compressed(text, wrapping), slice_bytes);
          for (const size_t most : {size, size + 1, 2 * size + 100}) {
            const auto whole = Decompress(compressed, static_cast<int64_t>(most));
            ASSERT_TRUE(whole.ok()) << whole.status() << " of " << size;
            ASSERT_EQ(Text(*whole), text);
          }
          if (size == 0) continue;
          for (const size_t most : {size - 1, size / 2}) {
            EXPECT_TRUE(absl::IsResourceExhausted(Decompress(compressed, static_cast<int64_t>(most)).status())) << most;
          }
        }
      }
    }
  }
}

TEST(Decompress, TakesBytesOneByOne) {
  const std::string text(2000, 'a');
  EXPECT_EQ(Text(Decompress(Buffer(Compressed(text, kGzip), 1), 2000).value()), text);
}

TEST(Decompress, RefusesWhatIsCutOffChangedOrFollowed) {
  std::string text;
  for (int i = 0; i < 200; ++i) text += std::to_string(i * i);
  for (const int wrapping : {kGzip, kDeflate}) {
    const std::string whole = Compressed(text, wrapping);
    const auto code = [](const std::string& bytes) { return Decompress(Buffer(bytes, 64), 1 << 20).status().code(); };
    for (size_t size = 0; size < whole.size(); ++size) {
      EXPECT_EQ(code(whole.substr(0, size)), absl::StatusCode::kInvalidArgument) << size;
    }
    EXPECT_EQ(code(whole + "x"), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(code(whole + whole), absl::StatusCode::kInvalidArgument);
    std::string changed = whole;
    changed[whole.size() - 5] ^= 1;  // a checksum
    EXPECT_EQ(code(changed), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(code(text), absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace dejavu
