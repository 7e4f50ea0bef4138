// config.json, and behind a separator generation_config.json: a shape that is accepted can be built.
#include <string>
#include <vector>

#include "engine/model/opt_config.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

void Run(absl::string_view bytes) {
  static const FuzzFiles& files = *new FuzzFiles;
  FuzzInput input(bytes);
  files.Write("config.json", input.Section());
  input.empty() ? files.Remove("generation_config.json") : void(files.Write("generation_config.json", input.Rest()));
  const absl::StatusOr<OptConfig> config = OptConfig::Load(files.path());
  CheckAnswer(config.status(), {absl::StatusCode::kInvalidArgument});
  if (!config.ok()) return;
  for (const int32_t size : {config->hidden, config->layers, config->heads, config->head_dim, config->ffn,
                             config->vocab, config->context, config->embed}) {
    CHECK(size >= 1 && size <= 1 << 20) << size;
  }
  CHECK(config->heads * config->head_dim == config->hidden) << config->heads << " heads of " << config->head_dim;
  CHECK(config->eos_tokens.size() <= kMostEndTokens) << config->eos_tokens.size();
  std::vector<int32_t> tokens = config->eos_tokens;
  if (config->bos_token.has_value()) tokens.push_back(*config->bos_token);
  for (const int32_t token : tokens) CHECK(token >= 0 && token < config->vocab) << token;
  CHECK(config->pre_norm || !config->final_norm) << "a last norm after post-norm layers";
}

}  // namespace

FuzzTarget ModelConfigTarget() {
  return {"model_config",
          2048,
          Run,
          {R"({"model_type":"opt"})",
           R"({"architectures":["OPTForCausalLM"],"hidden_size":1024,"word_embed_proj_dim":512,)"
           R"("do_layer_norm_before":false,"ffn_dim":4096,"num_attention_heads":16,)"
           R"("num_hidden_layers":24,"vocab_size":50272,"max_position_embeddings":2048})",
           R"({"model_type":"opt","hidden_size":64,"num_attention_heads":4,"ffn_dim":256,"activation_function":"relu",)"
           R"("bos_token_id":1,"eos_token_id":2,"enable_bias":false,"layer_norm_elementwise_affine":false,)"
           R"("_remove_final_layer_norm":true,"tie_word_embeddings":true,"torch_dtype":"float16","vocab_size":50})",
           "{\"model_type\":\"opt\",\"eos_token_id\":[2,-1],\"layerdrop\":NaN}\x1e{\"eos_token_id\":[7,50272],\"top_"
           "k\":5}"},
          {"\"hidden_size\":",
           "\"num_hidden_layers\":",
           "\"num_attention_heads\":",
           "\"ffn_dim\":",
           "\"vocab_size\":",
           "\"max_position_embeddings\":",
           "\"word_embed_proj_dim\":",
           "\"bos_token_id\":",
           "\"eos_token_id\":",
           "\"quantization_config\":",
           "\"activation_function\":",
           "\"relu\"",
           "true",
           "false",
           "NaN",
           "-Infinity",
           "\x1e",
           "null",
           "1e9",
           "-1",
           "18446744073709551615",
           "2147483648",
           "[",
           "{",
           "\\ud800"}};
}

}  // namespace dejavu
