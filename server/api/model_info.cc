#include "server/api/model_info.h"

#include "kernels/base/status_macros.h"
#include "server/api/validate.h"

namespace dejavu {

absl::Status GetModelInfo(const ServingState& state, const v1::GetModelInfoRequest& request,
                          v1::GetModelInfoResponse* response) {
  const ServedModel& model = state.model();
  RETURN_IF_ERROR(CheckModelName(request.model(), model));
  const Engine& engine = *model.engine;
  const ModelShape& shape = engine.model();
  response->set_model(model.name);
  response->set_architecture(kModelFamily);
  response->set_layers(static_cast<uint32_t>(shape.layers));
  response->set_hidden_size(static_cast<uint32_t>(shape.hidden));
  response->set_attention_heads(static_cast<uint32_t>(shape.heads));
  response->set_ffn_size(static_cast<uint32_t>(shape.ffn));
  response->set_vocabulary_size(static_cast<uint32_t>(shape.vocab));
  response->set_context_tokens(static_cast<uint32_t>(shape.context));
  response->set_weight_dtype(engine.weight_type());
  response->set_weight_bytes(static_cast<uint64_t>(engine.weight_bytes()));
  response->set_has_tokenizer(model.tokenizer != nullptr);
  response->set_bos_token_id(static_cast<uint32_t>(shape.bos_token.value_or(0)));
  response->mutable_eos_token_ids()->Add(shape.eos_tokens.begin(), shape.eos_tokens.end());
  if (!shape.eos_tokens.empty()) response->set_eos_token_id(response->eos_token_ids(0));
  return absl::OkStatus();
}

}  // namespace dejavu
