// Tiers and reports over gRPC, with an engine that says what the test wants.
#include <memory>
#include <string>

#include "dejavu/v1/generation.grpc.pb.h"
#include "gmock/gmock.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "server/api/sparsity_messages.h"
#include "server/server.h"
#include "tests/server/fake_engine.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class Sparsity : public testing::Test {
 protected:
  void Start(ServerOptions options = {}) {
    options.listen = "127.0.0.1:0";
    options.metrics_listen = "";
    server_ = Server::Start(options, {}).value();
    stub_ = v1::GenerationService::NewStub(
        grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials()));
  }
  void Serve(ServerOptions options = {}) {
    Start(options);
    server_->SetReady(&engine_, nullptr);
  }
  v1::SparsityInfo Info() {
    grpc::ClientContext context;
    v1::GetServerInfoResponse info;
    EXPECT_TRUE(stub_->GetServerInfo(&context, {}, &info).ok());
    return info.sparsity();
  }

  FakeEngine engine_;  // outlives the server
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::GenerationService::Stub> stub_;
};

TEST(SparsityMessages, EveryTierHasItsNumber) {
  for (const Tier tier : kAllTiers) EXPECT_EQ(FromMessage(ToMessage(tier)), tier);
  EXPECT_EQ(ToMessage(Tier::kDense), v1::TIER_DENSE);
  EXPECT_EQ(ToMessage(Tier::kFast), v1::TIER_FAST);
  EXPECT_FALSE(FromMessage(v1::TIER_UNSPECIFIED).has_value());
  EXPECT_FALSE(FromMessage(static_cast<v1::Tier>(6)).has_value());
}

TEST_F(Sparsity, ALoadingServerTellsItsLimitsOnly) {
  ServerOptions options;
  options.default_tier = Tier::kHigh;
  options.highest_tier = Tier::kExact;
  options.lowest_tier = Tier::kBalanced;
  options.shadow_every = 0;
  Start(options);
  const v1::SparsityInfo info = Info();
  EXPECT_EQ(info.default_tier(), v1::TIER_HIGH);
  EXPECT_EQ(info.highest_tier(), v1::TIER_EXACT);
  EXPECT_EQ(info.lowest_tier(), v1::TIER_BALANCED);
  EXPECT_EQ(info.shadow_every(), 0u);
  EXPECT_THAT(info.available_tiers(), IsEmpty());
}

TEST_F(Sparsity, WithoutAPredictorTwoTiersAreThere) {
  Serve();
  const v1::SparsityInfo info = Info();
  EXPECT_EQ(info.default_tier(), v1::TIER_EXACT);
  EXPECT_THAT(info.available_tiers(), ElementsAre(v1::TIER_DENSE, v1::TIER_EXACT));
  EXPECT_EQ(info.predictor(), "");
  EXPECT_EQ(info.shadow_every(), 256u);
  EXPECT_EQ(info.shadow_tokens(), 0u);
  EXPECT_EQ(info.shadow_top1_agreement(), 0.0);
}

TEST_F(Sparsity, TiersThatAreServedButNotAllowedAreNotAvailable) {
  engine_.predictor_info = {"p.safetensors", "mlp-norm", {Tier::kHigh, Tier::kFast}, 12345};
  ServerOptions options;
  options.highest_tier = Tier::kExact;
  options.lowest_tier = Tier::kBalanced;
  Serve(options);
  const v1::SparsityInfo info = Info();
  EXPECT_THAT(info.available_tiers(), ElementsAre(v1::TIER_EXACT, v1::TIER_HIGH));
  EXPECT_EQ(info.predictor(), "p.safetensors");
  EXPECT_EQ(info.predictor_tap(), "mlp-norm");
  EXPECT_EQ(info.predictor_bytes(), 12345u);
}

TEST_F(Sparsity, ShadowChecksAreToldAsMeansAndLayersAsSums) {
  engine_.stats_of_sparsity.shadow_tokens = 8;
  engine_.stats_of_sparsity.shadow_agreements = 6;
  engine_.stats_of_sparsity.shadow_kl_nats = 2.0;
  engine_.stats_of_sparsity.layers.resize(3);
  engine_.stats_of_sparsity.layers[0].fallbacks = 2;
  engine_.stats_of_sparsity.layers[0].recoveries = 1;
  engine_.stats_of_sparsity.layers[2].fallbacks = 5;
  engine_.stats_of_sparsity.exact_now = {{Tier::kFast, 2}};
  Serve();
  const v1::SparsityInfo info = Info();
  EXPECT_EQ(info.shadow_tokens(), 8u);
  EXPECT_DOUBLE_EQ(info.shadow_top1_agreement(), 0.75);
  EXPECT_DOUBLE_EQ(info.shadow_kl_nats(), 0.25);
  EXPECT_EQ(info.fallbacks(), 7u);
  EXPECT_EQ(info.recoveries(), 1u);
  ASSERT_EQ(info.exact_layers_size(), 1);
  EXPECT_EQ(info.exact_layers(0).tier(), v1::TIER_FAST);
  EXPECT_EQ(info.exact_layers(0).layer(), 2u);
}

TEST_F(Sparsity, ARequestRunsInItsTierAndHearsItsReport) {
  engine_.predictor_info.tiers = {Tier::kHigh, Tier::kBalanced};
  engine_.finish.sparsity.tier = Tier::kBalanced;
  engine_.finish.sparsity.mlp_density = 0.25;
  Serve();
  v1::GenerateRequest request;
  request.mutable_token_ids()->add_ids(2);
  request.mutable_sparsity()->set_tier(v1::TIER_BALANCED);
  request.mutable_sparsity()->set_deterministic(true);
  request.mutable_sparsity()->set_shadow_every(3);
  grpc::ClientContext context;
  v1::GenerateResponse response;
  const grpc::Status status = stub_->Generate(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(engine_.request.sparsity.tier, Tier::kBalanced);
  EXPECT_TRUE(engine_.request.sparsity.deterministic);
  EXPECT_EQ(engine_.request.sparsity.shadow_every, 3);
  EXPECT_EQ(response.prompt().tier(), v1::TIER_BALANCED);
  EXPECT_EQ(response.finish().sparsity().tier(), v1::TIER_BALANCED);
  EXPECT_DOUBLE_EQ(response.finish().sparsity().mlp_density(), 0.25);
}

TEST_F(Sparsity, ARequestThatNamesNothingGetsTheServersDefaults) {
  engine_.predictor_info.tiers = {Tier::kFast};
  ServerOptions options;
  options.default_tier = Tier::kFast;
  options.shadow_every = 17;
  Serve(options);
  v1::GenerateRequest request;
  request.mutable_token_ids()->add_ids(2);
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_TRUE(stub_->Generate(&context, request, &response).ok());
  EXPECT_EQ(engine_.request.sparsity.tier, Tier::kFast);
  EXPECT_EQ(engine_.request.sparsity.shadow_every, 17);
  EXPECT_FALSE(engine_.request.sparsity.deterministic);
  EXPECT_EQ(response.prompt().tier(), v1::TIER_FAST);
}

}  // namespace
}  // namespace dejavu
