#include "kernels/base/regular_file.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class RegularFileTest : public ::testing::Test {
 protected:
  std::string Path(const char* name) const { return scratch_.Path(name); }
  std::string Write(const char* name, const std::string& text) const { return scratch_.Write(name, text); }

  const ScratchDirectory scratch_;
  const std::string folder_ = scratch_.path();
};

void ExpectRefused(const std::string& path, absl::StatusCode code, const std::string& reason) {
  const absl::Status status = ReadRegularFile(path, 100).status();
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), StartsWith(path + ": "));
  EXPECT_THAT(std::string(status.message()), HasSubstr(reason));
}

// A read of a FIFO, a terminal or /dev/zero would not end, so that a test which fails here hangs.
TEST_F(RegularFileTest, NothingElseIsRead) {
  const absl::StatusCode refused = absl::StatusCode::kInvalidArgument;
  ExpectRefused(folder_, refused, "is a directory, not a regular file");
  ASSERT_EQ(mkfifo(Path("fifo").c_str(), 0600), 0);
  ExpectRefused(Path("fifo"), refused, "is a FIFO, not a regular file");
  ASSERT_EQ(symlink("fifo", Path("link").c_str()), 0);
  ExpectRefused(Path("link"), refused, "is a FIFO, not a regular file");
  ExpectRefused("/dev/zero", refused, "is a device, not a regular file");
  ExpectRefused("/dev/null", refused, "is a device, not a regular file");

  const int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
  const std::string name = Path("socket");
  ASSERT_LT(name.size(), sizeof(address.sun_path));
  name.copy(address.sun_path, name.size());
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ExpectRefused(name, refused, "is a socket, not a regular file");
  close(listener);
}

TEST_F(RegularFileTest, SaysWhyItCannotBeOpened) {
  ExpectRefused(Path("nothing"), absl::StatusCode::kNotFound, "No such file");
  ASSERT_EQ(symlink("nowhere", Path("dangling").c_str()), 0);
  ExpectRefused(Path("dangling"), absl::StatusCode::kNotFound, "No such file");
  ASSERT_EQ(symlink("loop", Path("loop").c_str()), 0);
  EXPECT_FALSE(RegularFile::Open(Path("loop")).ok());
  EXPECT_FALSE(RegularFile::Open(Write("file", "x") + "/below").ok());
}

TEST_F(RegularFileTest, IsReadWholeUpToTheLimit) {
  EXPECT_EQ(ReadRegularFile(Write("empty", ""), 0).value(), "");
  const std::string text("a\0b\xFF\n", 5);
  EXPECT_EQ(ReadRegularFile(Write("file", text), 5).value(), text);
  ExpectRefused(Write("large", std::string(101, 'x')), absl::StatusCode::kInvalidArgument,
                "has 101 bytes; the limit is 100");
  ASSERT_EQ(truncate(Path("large").c_str(), int64_t{1} << 40), 0);  // nothing is allocated for it
  ExpectRefused(Path("large"), absl::StatusCode::kInvalidArgument, "has 1099511627776 bytes; the limit is 100");
}

TEST_F(RegularFileTest, IsReadByOffset) {
  const auto file = RegularFile::Open(Write("file", "0123456789"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->size(), 10);
  EXPECT_EQ((*file)->ReadString(3, 4).value(), "3456");
  EXPECT_EQ((*file)->ReadString(10, 0).value(), "");
  for (const int64_t offset : {8, 11}) {
    const absl::Status status = (*file)->ReadString(offset, 4).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr("ends within the 4 bytes at offset"));
  }
  // It became shorter after it was opened.
  ASSERT_EQ(truncate(Path("file").c_str(), 5), 0);
  char bytes[4];
  EXPECT_EQ((*file)->Read(3, 4, bytes).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace dejavu
