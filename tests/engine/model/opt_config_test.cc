#include "engine/model/opt_config.h"

#include "tests/engine/formats/checkpoint_files.h"

namespace dejavu {
namespace {

using testing::ElementsAre;

class OptConfigTest : public testing::Test {
 protected:
  absl::StatusOr<OptConfig> LoadText(const std::string& text) {
    directory_.Write("config.json", text);
    return OptConfig::Load(directory_.path());
  }
  // An OPT config with one field.
  absl::StatusOr<OptConfig> LoadField(const std::string& field) {
    return LoadText(R"({"model_type": "opt", )" + field + "}");
  }

  const ScratchDirectory directory_;
  const std::string path_ = directory_.Path("config.json");
};

TEST_F(OptConfigTest, TakesTheDefaultsOfTransformersForWhatIsAbsent) {
  const auto config = LoadText(R"({"model_type": "opt"})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->hidden, 768);
  EXPECT_EQ(config->layers, 12);
  EXPECT_EQ(config->heads, 12);
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->ffn, 3072);
  EXPECT_EQ(config->vocab, 50272);
  EXPECT_EQ(config->context, 2048);
  EXPECT_EQ(config->embed, 768);
  EXPECT_TRUE(config->pre_norm);
  EXPECT_TRUE(config->final_norm);
  EXPECT_TRUE(config->biases);
  EXPECT_TRUE(config->affine_norms);
  EXPECT_EQ(config->bos_token, 2);
  EXPECT_THAT(config->eos_tokens, ElementsAre(2));
  EXPECT_TRUE(config->tied);
  EXPECT_TRUE(config->unused_settings.empty());
  EXPECT_EQ(LoadField(R"("hidden_size": 96)")->embed, 96);
}

TEST_F(OptConfigTest, ReadsThePostNormFormOf350m) {
  const auto config = OptConfig::Load(TESTDATA "/opt/post-norm-350m-form");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->hidden, 128);
  EXPECT_EQ(config->embed, 64);
  EXPECT_FALSE(config->pre_norm);
  EXPECT_FALSE(config->final_norm);
}

TEST_F(OptConfigTest, ReadsEveryFieldOfTheOtherForms) {
  const auto sharded = OptConfig::Load(TESTDATA "/opt/pre-norm-hd128-sharded");
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  EXPECT_EQ(sharded->head_dim, 128);
  EXPECT_EQ(sharded->ffn, 1024);
  EXPECT_EQ(sharded->vocab, 777);
  EXPECT_EQ(sharded->context, 128);
  EXPECT_EQ(OptConfig::Load(TESTDATA "/opt/pre-norm-hd80")->head_dim, 80);
  EXPECT_EQ(OptConfig::Load(TESTDATA "/opt/pre-norm-hd64")->heads, 3);
  EXPECT_EQ(OptConfig::Load(TESTDATA "/opt/odd-ffn-float32")->ffn, 301);
  EXPECT_EQ(OptConfig::Load(TESTDATA "/opt/old-key-prefix")->layers, 2);
  EXPECT_TRUE(OptConfig::Load(EMBEDDED_MODEL).ok());
  EXPECT_FALSE(LoadField(R"("_remove_final_layer_norm": true)")->final_norm);
  EXPECT_FALSE(LoadField(R"("enable_bias": false)")->biases);
  EXPECT_FALSE(LoadField(R"("layer_norm_elementwise_affine": false)")->affine_norms);
  EXPECT_FALSE(LoadField(R"("tie_word_embeddings": false)")->tied);
  EXPECT_EQ(LoadField(R"("bos_token_id": 0)")->bos_token, 0);
}

TEST_F(OptConfigTest, AcceptsAnArchitectureInPlaceOfTheModelType) {
  EXPECT_TRUE(LoadText(R"({"architectures": ["OPTForCausalLM"]})").ok());
  EXPECT_TRUE(LoadText(R"({"architectures": ["OPTModel"]})").ok());
  ExpectRefused(LoadText(R"({"architectures": ["GPT2LMHeadModel"]})"), {path_, "only OPT"});
  ExpectRefused(LoadText(R"({"architectures": "OPTModel"})"), {path_, "only OPT"});
  ExpectRefused(LoadText("{}"), {path_, "only OPT"});
  ExpectRefused(LoadText(R"({"model_type": "llama", "architectures": ["OPTModel"]})"), {path_, "model_type", "llama"});
  ExpectRefused(LoadText(R"({"model_type": null})"), {path_, "model_type", "null"});
}

TEST_F(OptConfigTest, RefusesWhatTheModelDoesNotCompute) {
  ExpectRefused(LoadField(R"("activation_function": "gelu")"), {path_, "activation_function is \"gelu\"", "\"relu\""});
  ExpectRefused(LoadField(R"("activation_function": 7)"), {path_, "activation_function is 7"});
  ExpectRefused(LoadField(R"("quantization_config": {"bits": 4})"), {path_, "quantization_config"});
  ExpectRefused(LoadField(R"("num_attention_heads": 7)"), {path_, "hidden_size is 768", "num_attention_heads, 7"});
}

TEST_F(OptConfigTest, NamesFieldValueAndLimitOfWhatIsOutOfRange) {
  ExpectRefused(LoadField(R"("hidden_size": 0)"), {path_, "hidden_size is 0", "1 to 65536"});
  ExpectRefused(LoadField(R"("hidden_size": 65537)"), {path_, "hidden_size is 65537", "1 to 65536"});
  ExpectRefused(LoadField(R"("num_hidden_layers": 1025)"), {path_, "num_hidden_layers is 1025", "1 to 1024"});
  ExpectRefused(LoadField(R"("num_attention_heads": -1)"), {path_, "num_attention_heads is -1"});
  ExpectRefused(LoadField(R"("ffn_dim": 18446744073709551615)"), {path_, "ffn_dim is 18446744073709551615"});
  ExpectRefused(LoadField(R"("ffn_dim": -9223372036854775808)"), {path_, "ffn_dim is -9223372036854775808"});
  ExpectRefused(LoadField(R"("vocab_size": 1048577)"), {path_, "vocab_size is 1048577", "1048576"});
  ExpectRefused(LoadField(R"("max_position_embeddings": 4294967297)"),
                {path_, "max_position_embeddings is 4294967297"});
  ExpectRefused(LoadField(R"("word_embed_proj_dim": 0)"), {path_, "word_embed_proj_dim is 0"});
  ExpectRefused(LoadField(R"("pad_token_id": 50272)"), {path_, "pad_token_id is 50272", "-50272 to 50271"});
}

TEST_F(OptConfigTest, TakesEndTokensThatCanCome) {
  EXPECT_THAT(LoadField(R"("eos_token_id": [7, -1, 50271, 7, 50272])")->eos_tokens, ElementsAre(7, 50271));
  for (const char* none : {"null", "[]", "-1", "50272", "9223372036854775807"}) {
    EXPECT_THAT(LoadField(std::string(R"("eos_token_id": )") + none)->eos_tokens, ElementsAre()) << none;
  }
  EXPECT_THAT(LoadField(R"("vocab_size": 2)")->eos_tokens, ElementsAre());  // the default is 2
  EXPECT_EQ(LoadField(R"("vocab_size": 2)")->bos_token, std::nullopt);
  EXPECT_EQ(LoadField(R"("bos_token_id": null)")->bos_token, std::nullopt);
  std::string many = "0";
  for (int i = 1; i <= 64; ++i) many += "," + std::to_string(i);
  ExpectRefused(LoadField(R"("eos_token_id": [)" + many + "]"), {path_, "eos_token_id", "more than 64 tokens"});
}

TEST_F(OptConfigTest, TakesTheEndTokensOfGenerationConfigWhereThereIsOne) {
  const std::string path = directory_.Write("generation_config.json", R"({"eos_token_id": [5, 3], "bos_token_id": 1})");
  EXPECT_THAT(LoadField(R"("eos_token_id": 7)")->eos_tokens, ElementsAre(5, 3));
  EXPECT_TRUE(LoadField(R"("eos_token_id": 7)")->unused_settings.empty());
  directory_.Write("generation_config.json",
                   R"({"temperature": NaN, "top_k": 5, "min_length": null, "use_cache": true})");
  const auto without = LoadField(R"("eos_token_id": 7)");
  EXPECT_THAT(without->eos_tokens, ElementsAre()) << "it names none";
  EXPECT_THAT(without->unused_settings, ElementsAre("\"temperature\"", "\"top_k\""));
  directory_.Write("generation_config.json", R"({"eos_token_id": "7"})");
  ExpectRefused(LoadField(R"("eos_token_id": 7)"), {path, "eos_token_id is \"7\""});
  directory_.Write("generation_config.json", "{");
  ExpectRefused(LoadField(R"("eos_token_id": 7)"), {path, "not valid JSON"});
}

TEST_F(OptConfigTest, ReadsConstantsThatPythonWrites) {
  const auto config = LoadField(R"("layerdrop": NaN, "init_std": -Infinity, "x": ["NaN\"", Infinity], "ffn_dim": 8)");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->ffn, 8);
}

TEST_F(OptConfigTest, RefusesWrongTypes) {
  ExpectRefused(LoadField(R"("hidden_size": "768")"), {path_, "hidden_size is \"768\"", "an integer"});
  ExpectRefused(LoadField(R"("hidden_size": 768.0)"), {path_, "hidden_size is 768.0", "an integer"});
  ExpectRefused(LoadField(R"("eos_token_id": [2, "3"])"), {path_, "eos_token_id is [2,\"3\"]", "a list of integers"});
  ExpectRefused(LoadField(R"("eos_token_id": 2.0)"), {path_, "eos_token_id is 2.0", "an integer"});
  ExpectRefused(LoadField(R"("bos_token_id": [2])"), {path_, "bos_token_id is [2]", "an integer or null"});
  ExpectRefused(LoadField(R"("layerdrop": "0")"), {path_, "layerdrop is \"0\"", "a number"});
  ExpectRefused(LoadField(R"("ffn_dim": Infinity)"), {path_, "ffn_dim is \"Infinity\"", "an integer"});
  ExpectRefused(LoadField(R"("enable_bias": 1)"), {path_, "enable_bias is 1", "true or false"});
}

TEST_F(OptConfigTest, RefusesFilesThatHoldNoConfig) {
  ExpectRefused(OptConfig::Load(directory_.path()), {path_, "No such file"});
  ExpectRefused(LoadText(""), {path_, "not valid JSON"});
  ExpectRefused(LoadText("[1]"), {path_, "not an object"});
  ExpectRefused(LoadText(R"({"model_type": "opt")"), {path_, "not valid JSON"});
  ExpectRefused(LoadText(R"({"model_type": "opt", "ffn_dim": 8, "ffn_dim": 9})"), {path_, "\"ffn_dim\" appears twice"});
  ExpectRefused(LoadText(std::string((1 << 20) + 1, ' ')), {path_, "1048577 bytes"});
  std::filesystem::remove(path_);
  std::filesystem::create_directory(path_);
  ExpectRefused(OptConfig::Load(directory_.path()), {path_, "not a regular file"});
}

}  // namespace
}  // namespace dejavu
