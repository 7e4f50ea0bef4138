#include "server/rpc/error_details.h"

#include "dejavu/rpc/status.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

rpc::Status Details(const grpc::Status& status) {
  rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(status.error_details()));
  return details;
}

TEST(ErrorDetails, CarryTheViolatedField) {
  const grpc::Status status = ToGrpcStatus(InvalidField("sampling.top_p", "is 2; it must be in (0, 1]"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), "sampling.top_p is 2; it must be in (0, 1]");
  const rpc::Status details = Details(status);
  EXPECT_EQ(details.code(), 3);
  EXPECT_EQ(details.message(), status.error_message());
  ASSERT_EQ(details.details_size(), 1);
  EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.BadRequest");
  rpc::BadRequest bad_request;
  ASSERT_TRUE(bad_request.ParseFromString(details.details(0).value()));
  EXPECT_EQ(bad_request.field_violations(0).field(), "sampling.top_p");
  EXPECT_EQ(bad_request.field_violations(0).description(), "is 2; it must be in (0, 1]");
}

TEST(ErrorDetails, SayWhenToTryAgain) {
  const rpc::Status details = Details(ToGrpcStatus(UnavailableRetry("loading", std::chrono::milliseconds(2500))));
  EXPECT_EQ(details.code(), 14);
  ASSERT_EQ(details.details_size(), 1);
  EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.RetryInfo");
  rpc::RetryInfo retry;
  ASSERT_TRUE(retry.ParseFromString(details.details(0).value()));
  EXPECT_EQ(retry.retry_delay().seconds(), 2);
  EXPECT_EQ(retry.retry_delay().nanos(), 500'000'000);
}

TEST(ErrorDetails, NameQuotaAndRetryTogether) {
  const rpc::Status details = Details(ToGrpcStatus(QuotaExceeded("queue", "full", std::chrono::seconds(1))));
  EXPECT_EQ(details.code(), 8);
  EXPECT_EQ(details.details_size(), 2);
}

TEST(ErrorDetails, StayBelowFourKibibytesAndValidUtf8) {
  std::string long_text;
  for (int i = 0; i < 10'000; ++i) long_text += "\xC3\xA4";  // two bytes each
  absl::Status status = InvalidField("text", long_text);
  for (const char* reason : {"A", "B"}) {
    status = WithErrorInfo(status, reason, {{"k1", long_text}, {"k2", long_text}, {"k3", long_text}});
  }
  const grpc::Status packed = ToGrpcStatus(status);
  EXPECT_LT(packed.error_message().size() + packed.error_details().size(), 4096u);
  // A cut inside a character would not parse: proto3 checks strings.
  EXPECT_EQ(Details(packed).message(), packed.error_message());
}

TEST(ErrorDetails, QuoteWhatClientsSay) {
  EXPECT_EQ(Printable("a\nb\xFF"), "\"a\\nb\\xff\"");
  EXPECT_EQ(Printable("abcdef", 3), "\"abc\"...");
}

TEST(ErrorDetails, AreAbsentWhereNothingIsToBeSaid) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_EQ(ToGrpcStatus(absl::CancelledError("gone")).error_details(), "");
}

}  // namespace
}  // namespace dejavu
