// A pipe that blocks or is closed, and what comes again and again.
#include "server/observe/log_pipe.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/observe/repeat_filter.h"

namespace dejavu {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

TEST(RepeatFilter, LetsTheFirstThroughAndCountsTheRestOfTheWindow) {
  RepeatFilter filter(seconds(10));
  const RepeatFilter::Time start = std::chrono::steady_clock::now();
  EXPECT_EQ(filter.next_end(), RepeatFilter::Time::max());
  EXPECT_TRUE(filter.Admit(spdlog::level::warn, "a", start));
  EXPECT_TRUE(filter.Admit(spdlog::level::warn, "b", start + seconds(1)));
  for (int i = 0; i < 7; ++i) EXPECT_FALSE(filter.Admit(spdlog::level::warn, "a", start + seconds(9)));
  EXPECT_EQ(filter.next_end(), start + seconds(10));
  EXPECT_THAT(filter.TakeEnded(start + seconds(9)), IsEmpty());
  const auto ended = filter.TakeEnded(start + seconds(10));
  ASSERT_THAT(ended, SizeIs(1));
  EXPECT_EQ(ended[0].message, "a");
  EXPECT_EQ(ended[0].count, 7);
  EXPECT_TRUE(filter.Admit(spdlog::level::warn, "a", start + seconds(10)));
  EXPECT_FALSE(filter.Admit(spdlog::level::warn, "a", start + seconds(11)));
  EXPECT_THAT(filter.TakeEnded(start + seconds(12)), IsEmpty());  // b's window left nothing out
}

TEST(RepeatFilter, WatchesABoundedNumberOfMessages) {
  RepeatFilter filter(seconds(10));
  const RepeatFilter::Time now = std::chrono::steady_clock::now();
  int admitted = 0;
  for (size_t i = 0; i < 3 * RepeatFilter::kMaxMessages; ++i) {
    admitted += filter.Admit(spdlog::level::warn, absl::StrCat(i), now) ? 1 : 0;
  }
  EXPECT_EQ(admitted, RepeatFilter::kMaxMessages + 1);
  EXPECT_FALSE(filter.Admit(spdlog::level::warn, "0", now));
  int64_t left_out = 0;
  for (const RepeatFilter::LeftOut& left : filter.TakeEnded(now + seconds(10))) left_out += left.count;
  EXPECT_EQ(left_out, 2 * RepeatFilter::kMaxMessages);
  EXPECT_TRUE(filter.Admit(spdlog::level::warn, "later", now + seconds(10)));
}

TEST(RepeatFilter, LetsAsManyThroughAsItIsAskedTo) {
  RepeatFilter filter(seconds(1));
  const RepeatFilter::Time now = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) EXPECT_EQ(filter.Admit(spdlog::level::info, "a", now, /*most=*/5), i < 5);
  const auto ended = filter.TakeEnded(now + seconds(1));
  ASSERT_THAT(ended, SizeIs(1));
  EXPECT_EQ(ended[0].count, 95);
  EXPECT_TRUE(filter.Admit(spdlog::level::info, "a", now + seconds(1), /*most=*/5));
}

class LogPipeTest : public testing::Test {
 protected:
  LogPipeTest() {
    signal(SIGPIPE, SIG_IGN);
    EXPECT_EQ(pipe(fds_), 0);
  }
  ~LogPipeTest() override {
    for (const int fd : fds_) {
      if (fd >= 0) close(fd);
    }
  }
  std::unique_ptr<LogPipe> Pipe(size_t max_bytes = 1 << 16) {
    return std::make_unique<LogPipe>(
        fds_[1], max_bytes, [](int64_t n) { return absl::StrCat("lost ", n, "\n"); },
        [] { return LogPipe::Time::max(); });
  }
  std::string ReadSome() {
    std::string text(1 << 20, '\0');
    const ssize_t n = read(fds_[0], text.data(), text.size());
    text.resize(n < 0 ? 0 : static_cast<size_t>(n));
    return text;
  }

  int fds_[2] = {-1, -1};
};

TEST_F(LogPipeTest, WritesLinesInOrder) {
  auto pipe = Pipe();
  const std::string large(10'000, 'x');
  pipe->Write("a\n");
  pipe->Write(large + "\n");
  pipe->Write("b\n");
  EXPECT_TRUE(pipe->Flush(seconds(60)));
  EXPECT_EQ(ReadSome(), "a\n" + large + "\nb\n");
  EXPECT_EQ(pipe->dropped(), 0);
}

TEST_F(LogPipeTest, DropsAndCountsWhatNobodyReadsAndSaysSoLater) {
  auto pipe = Pipe(/*max_bytes=*/10'000);
  const std::string line = std::string(999, 'x') + "\n";
  pipe->Write(line);
  while (pipe->Flush(seconds(2))) pipe->Write(line);  // until the pipe is full
  EXPECT_EQ(pipe->dropped(), 0);
  for (int i = 0; i < 100; ++i) pipe->Write(line);
  EXPECT_EQ(pipe->dropped(), 90);
  std::string text;
  while (text.find("lost") == std::string::npos) text += ReadSome();
  EXPECT_THAT(text, HasSubstr("\nlost 90\n"));
}

TEST_F(LogPipeTest, EndsInTimeWhenNobodyReads) {
  auto pipe = Pipe();
  for (int i = 0; i < 200; ++i) pipe->Write(std::string(1000, 'x'));
  const auto start = std::chrono::steady_clock::now();
  pipe->Close(milliseconds(300));
  EXPECT_LT(std::chrono::steady_clock::now() - start, seconds(5));
  EXPECT_GT(pipe->dropped(), 0);
}

TEST_F(LogPipeTest, SurvivesAReaderThatIsGone) {
  auto pipe = Pipe();
  close(std::exchange(fds_[0], -1));
  for (int i = 0; i < 10; ++i) pipe->Write("line\n");
  EXPECT_TRUE(pipe->Flush(seconds(60)));
  EXPECT_EQ(pipe->dropped(), 10);
}

}  // namespace
}  // namespace dejavu
