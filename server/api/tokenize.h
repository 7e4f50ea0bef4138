// Tokenize and Detokenize: what the model's tokenizer makes of a text, and of ids. Any thread.
#ifndef SERVER_API_TOKENIZE_H_
#define SERVER_API_TOKENIZE_H_

#include "absl/status/status.h"
#include "dejavu/v1/generation.pb.h"
#include "server/api/serving_state.h"

namespace dejavu {

absl::Status Tokenize(const ServingState& state, const v1::TokenizeRequest& request, v1::TokenizeResponse* response);

absl::Status Detokenize(const ServingState& state, const v1::DetokenizeRequest& request,
                        v1::DetokenizeResponse* response);

}  // namespace dejavu

#endif  // SERVER_API_TOKENIZE_H_
