// vLLM's SamplingParams as its clients write them in JSON, put into a GenerateRequest: what the tensor
// sampling_parameters of Triton's vLLM backend holds. And vLLM's names of our fields, for what is refused later. Pure
// functions; any thread.
#ifndef SERVER_API_SAMPLING_PARAMETERS_H_
#define SERVER_API_SAMPLING_PARAMETERS_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dejavu/v1/generation.pb.h"
#include "nlohmann/json_fwd.hpp"
#include "server/rpc/error_details.h"

namespace dejavu {

// What vLLM takes where nothing is said: temperature 1 and 16 tokens.
void SetVllmDefaults(v1::GenerateRequest* request);

// An object of parameters. A number may be written as a string, and null is as good as nothing. INVALID_ARGUMENT by
// name for a parameter that vLLM does not have, or that cannot be served here.
absl::Status ReadSamplingParameters(const nlohmann::json& parameters, v1::GenerateRequest* request);
absl::Status ReadSamplingText(absl::string_view json, v1::GenerateRequest* request);

// By the names of SamplingParams.
absl::Span<const FieldName> VllmNames();

}  // namespace dejavu

#endif  // SERVER_API_SAMPLING_PARAMETERS_H_
