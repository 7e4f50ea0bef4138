// Tensors of the Open Inference Protocol, read from a request and added to a reply. Contents stand in the tensor
// itself, or, as stock clients send them, beside it as raw bytes. Pure functions; any thread.
#ifndef SERVER_API_KSERVE_TENSORS_H_
#define SERVER_API_KSERVE_TENSORS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kserve/inference.pb.h"

namespace dejavu {

struct KServeInput {
  const inference::ModelInferRequest::InferInputTensor* tensor;
  std::optional<absl::string_view> raw;
};

// The tensors of a request with what is raw of them. INVALID_ARGUMENT where their numbers differ, and for contents in
// shared memory.
absl::StatusOr<std::vector<KServeInput>> PairInputs(const inference::ModelInferRequest& request);

// The one element of a tensor, or all of them. INVALID_ARGUMENT with the tensor's name where datatype, shape and
// contents do not fit.
absl::StatusOr<std::string> BytesOf(const KServeInput& input);
absl::StatusOr<bool> FlagOf(const KServeInput& input);
absl::StatusOr<std::vector<uint32_t>> IdsOf(const KServeInput& input);

// Adds an output of so many elements. `raw` is what AppendBytes or AppendNumber have made.
void AddOutput(absl::string_view name, absl::string_view datatype, int64_t elements, std::string raw,
               inference::ModelInferResponse* response);
void AppendBytes(absl::string_view element, std::string* raw);
template <typename Number>
void AppendNumber(Number number, std::string* raw) {
  raw->append(reinterpret_cast<const char*>(&number), sizeof(number));
}

}  // namespace dejavu

#endif  // SERVER_API_KSERVE_TENSORS_H_
