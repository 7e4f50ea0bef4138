// What calls of a whole daemon answer, alone and together.
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "tests/server/end_to_end.h"
#include "tests/server/raw_call.h"

namespace dejavu {
namespace {

using testing::HasSubstr;

TEST_F(EndToEnd, AUnaryCallAndAStreamSayTheSame) {
  constexpr int kTokens = 400;  // not all of them in one chunk
  v1::GenerateRequest request = Request(kTokens);
  request.set_request_id("same");
  request.mutable_sampling()->set_temperature(0.9f);
  request.mutable_sampling()->set_seed(5);
  request.mutable_output()->set_top_logprobs(3);
  v1::GenerateResponse unary;
  ASSERT_TRUE(Generate(request, &unary).ok());
  EXPECT_EQ(unary.prompt().request_id(), "same");
  EXPECT_EQ(unary.prompt().model(), "opt-8m-books");
  EXPECT_EQ(unary.prompt().seed(), 5u);
  EXPECT_EQ(unary.prompt().max_new_tokens(), uint32_t{kTokens});
  EXPECT_EQ(unary.token_ids_size(), kTokens);
  EXPECT_EQ(unary.logprobs_size(), kTokens);
  EXPECT_EQ(unary.logprobs(7).top_size(), 3);
  EXPECT_EQ(unary.finish().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(unary.finish().generated_tokens(), uint32_t{kTokens});
  EXPECT_GT(unary.finish().timings().ttft_ms(), 0);
  EXPECT_LE(unary.finish().timings().ttft_ms(), unary.finish().timings().total_ms());
  EXPECT_EQ(unary.text(),
            tokenizer_->Decode(std::vector<int32_t>(unary.token_ids().begin(), unary.token_ids().end()), true));

  Streamed streamed = Stream(stub_.get(), request);
  ASSERT_TRUE(streamed.status.ok()) << streamed.status.error_message();
  EXPECT_GT(streamed.chunks, 1);
  unary.mutable_finish()->clear_timings();
  streamed.response.mutable_finish()->clear_timings();
  EXPECT_EQ(streamed.response.SerializeAsString(), unary.SerializeAsString());
}

TEST_F(EndToEnd, ReturnsTheSeedThatItDrew) {
  v1::GenerateRequest request = Request(20);
  request.mutable_sampling()->set_temperature(1);
  v1::GenerateResponse first, second;
  ASSERT_TRUE(Generate(request, &first).ok());
  EXPECT_LT(first.prompt().seed(), uint64_t{1} << 32);
  request.mutable_sampling()->set_seed(first.prompt().seed());
  ASSERT_TRUE(Generate(request, &second).ok());
  EXPECT_EQ(second.text(), first.text());
}

TEST_F(EndToEnd, StopsAtAStopString) {
  v1::GenerateResponse whole, stopped;
  ASSERT_TRUE(Generate(Request(60), &whole).ok());
  v1::GenerateRequest request = Request(60);
  const std::string stop = whole.text().substr(whole.text().size() / 2, 5);
  request.mutable_stopping()->add_stop_strings(stop);
  ASSERT_TRUE(Generate(request, &stopped).ok());
  EXPECT_EQ(stopped.text(), whole.text().substr(0, whole.text().find(stop)));
  EXPECT_EQ(stopped.finish().reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(stopped.finish().stop_string(), stop);
}

TEST_F(EndToEnd, ScoresWhatItGeneratedAsItReported) {
  v1::GenerateRequest request = Request(12);
  request.mutable_output()->set_logprobs(true);
  v1::GenerateResponse generated;
  ASSERT_TRUE(Generate(request, &generated).ok());

  v1::ScoreRequest score;
  for (int32_t id : tokenizer_->EncodePrompt(kPrompt)) score.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
  const int prompt_tokens = score.token_ids().ids_size();
  for (uint32_t id : generated.token_ids()) score.mutable_token_ids()->add_ids(id);
  score.set_top_logprobs(2);
  grpc::ClientContext context;
  v1::ScoreResponse scored;
  ASSERT_TRUE(stub_->Score(&context, score, &scored).ok());
  ASSERT_EQ(scored.tokens_size(), prompt_tokens + 12);
  EXPECT_FALSE(scored.tokens(0).has_logprob());
  for (int i = 0; i < 12; ++i) {
    const v1::ScoredToken& token = scored.tokens(prompt_tokens + i);
    EXPECT_EQ(token.id(), generated.token_ids(i));
    EXPECT_NEAR(token.logprob(), generated.logprobs(i).logprob(), 1e-3);
    EXPECT_EQ(token.rank(), 1u);  // greedy
    EXPECT_EQ(scored.tokens(prompt_tokens + i - 1).top(0).id(), token.id());
  }
}

TEST_F(EndToEnd, TokenizesBothWays) {
  grpc::ClientContext tokenize_context, detokenize_context;
  v1::TokenizeRequest tokenize;
  tokenize.set_text(kPrompt);
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub_->Tokenize(&tokenize_context, tokenize, &tokens).ok());
  EXPECT_EQ(tokens.token_ids(0), 2u);
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(stub_->Detokenize(&detokenize_context, detokenize, &text).ok());
  EXPECT_EQ(text.text(), kPrompt);
}

TEST_F(EndToEnd, DescribesTheModel) {
  grpc::ClientContext context;
  v1::GetModelInfoResponse info;
  ASSERT_TRUE(stub_->GetModelInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.layers(), 8u);
  EXPECT_EQ(info.context_tokens(), 512u);
  EXPECT_EQ(info.weight_dtype(), "float16");
  EXPECT_TRUE(info.has_tokenizer());
  EXPECT_EQ(info.eos_token_id(), 2u);
  ASSERT_EQ(info.eos_token_ids_size(), 1);
  EXPECT_EQ(info.eos_token_ids(0), 2u);
}

TEST_F(EndToEnd, RefusesBadRequestsWithTheirField) {
  v1::GenerateRequest request = Request(4);
  request.mutable_sampling()->set_temperature(std::numeric_limits<float>::quiet_NaN());
  v1::GenerateResponse response;
  const grpc::Status status = Generate(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("sampling.temperature is nan"));
  EXPECT_TRUE(HasDetail(status, "BadRequest"));
  EXPECT_EQ(RawCall(Channel(), "/dejavu.v1.GenerationService/GenerateStream", "\xFF").error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  request = Request(4);
  request.set_model("other");
  EXPECT_EQ(Generate(request, &response).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(EndToEnd, TellsWhichTiersItServes) {
  grpc::ClientContext context;
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(stub_->GetServerInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.sparsity().default_tier(), v1::TIER_EXACT);
  EXPECT_THAT(info.sparsity().available_tiers(), testing::ElementsAre(v1::TIER_DENSE, v1::TIER_EXACT));
  EXPECT_EQ(info.sparsity().predictor(), "");
}

TEST_F(EndToEnd, TheTierOfAReplyIsTheOneThatWasAskedFor) {
  v1::GenerateResponse by_default, dense;
  ASSERT_TRUE(Generate(Request(20), &by_default).ok());
  EXPECT_EQ(by_default.prompt().tier(), v1::TIER_EXACT);
  EXPECT_TRUE(by_default.finish().has_sparsity());
  v1::GenerateRequest request = Request(20);
  request.mutable_sparsity()->set_tier(v1::TIER_DENSE);
  request.mutable_sparsity()->set_deterministic(true);
  request.mutable_sparsity()->set_shadow_every(1);  // for predicted tiers; harmless elsewhere
  ASSERT_TRUE(Generate(request, &dense).ok());
  EXPECT_EQ(dense.prompt().tier(), v1::TIER_DENSE);
  EXPECT_FALSE(dense.finish().sparsity().has_shadow());
  EXPECT_EQ(dense.text(), by_default.text());
}

TEST_F(EndToEnd, RefusesATierWithoutItsPredictorWhileOtherStreamsGoOn) {
  v1::GenerateResponse alone;
  ASSERT_TRUE(Generate(Request(200), &alone).ok());
  grpc::ClientContext context;
  const auto reader = stub_->GenerateStream(&context, Request(200));
  reader->WaitForInitialMetadata();  // comes with the first chunk
  v1::GenerateRequest request = Request(4);
  for (const v1::Tier tier : {v1::TIER_HIGH, v1::TIER_BALANCED, v1::TIER_FAST}) {
    request.mutable_sparsity()->set_tier(tier);
    v1::GenerateResponse response;
    const grpc::Status unary = Generate(request, &response);
    EXPECT_EQ(unary.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_THAT(unary.error_message(), HasSubstr("needs a predictor"));
    EXPECT_TRUE(HasDetail(unary, "PreconditionFailure"));
    const Streamed streamed = Stream(stub_.get(), request);
    EXPECT_EQ(streamed.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_EQ(streamed.chunks, 0);
  }
  const Streamed beside = ReadAll(reader.get());
  EXPECT_TRUE(beside.status.ok()) << beside.status.error_message();
  EXPECT_EQ(beside.response.text(), alone.text());
  WaitUntilNothingRuns();
}

TEST_F(EndToEnd, ConcurrentStreamsSayWhatEachSaysAlone) {
  constexpr int kStreams = 16;
  std::vector<v1::GenerateRequest> requests;
  std::vector<std::string> alone;
  for (int i = 0; i < kStreams; ++i) {
    v1::GenerateRequest request = Request(10 + 9 * i, std::string(kPrompt).substr(0, 2 + i));
    request.mutable_sampling()->set_temperature(i % 3 == 0 ? 0.0f : 0.8f);
    request.mutable_sampling()->set_seed(1000 + i);
    requests.push_back(request);
    v1::GenerateResponse response;
    ASSERT_TRUE(Generate(request, &response).ok());
    alone.push_back(response.text());
  }
  std::vector<Streamed> together(kStreams);
  std::vector<std::thread> clients;
  for (int i = 0; i < kStreams; ++i) {
    clients.emplace_back([&, i] { together[i] = Stream(stub_.get(), requests[i]); });
  }
  for (std::thread& client : clients) client.join();
  for (int i = 0; i < kStreams; ++i) {
    EXPECT_TRUE(together[i].status.ok());
    EXPECT_EQ(together[i].response.text(), alone[i]) << i;
  }
  WaitUntilNothingRuns();
}

}  // namespace
}  // namespace dejavu
