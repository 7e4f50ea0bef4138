#include "server/api/kserve_tensors.h"

#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

using inference::InferTensorContents;
using Tensor = inference::ModelInferRequest::InferInputTensor;

constexpr int64_t kMostElements = 1 << 30;

std::string ShapeText(const Tensor& tensor) { return absl::StrCat("[", absl::StrJoin(tensor.shape(), ", "), "]"); }

absl::StatusOr<int64_t> Elements(const Tensor& tensor) {
  int64_t elements = 1;
  for (const int64_t dim : tensor.shape()) {
    const bool fits = dim >= 0 && (dim == 0 || elements <= kMostElements / dim);
    if (!fits) return InvalidField(tensor.name(), absl::StrCat("has the shape ", ShapeText(tensor)));
    elements *= dim;
  }
  return elements;
}

absl::Status CheckDatatype(const Tensor& tensor, absl::string_view wanted) {
  if (tensor.datatype() == wanted) return absl::OkStatus();
  return InvalidField(tensor.name(),
                      absl::StrCat("has the datatype ", Printable(tensor.datatype()), "; it must be ", wanted));
}

absl::Status CheckOneElement(const Tensor& tensor) {
  ASSIGN_OR_RETURN(const int64_t elements, Elements(tensor));
  if (elements == 1 && !tensor.shape().empty()) return absl::OkStatus();
  return InvalidField(tensor.name(), absl::StrCat("has the shape ", ShapeText(tensor), "; it must be [1]"));
}

absl::Status WrongContents(const Tensor& tensor, size_t elements, size_t expected) {
  return InvalidField(tensor.name(), absl::StrCat("has contents of ", elements, " elements; its shape ",
                                                  ShapeText(tensor), " holds ", expected));
}

absl::Status WrongBytes(const Tensor& tensor, size_t bytes) {
  return InvalidField(tensor.name(), absl::StrCat("has ", bytes, " raw bytes, which do not fit its datatype ",
                                                  tensor.datatype(), " and its shape ", ShapeText(tensor)));
}

// Of a raw tensor of whole numbers.
template <typename Number>
std::vector<Number> RawNumbers(absl::string_view raw) {
  std::vector<Number> numbers(raw.size() / sizeof(Number));
  if (!numbers.empty()) std::memcpy(numbers.data(), raw.data(), numbers.size() * sizeof(Number));
  return numbers;
}

// Ids by the numbers of a tensor: below zero or beyond 32 bits there are none.
template <typename Number, typename Contents>
absl::StatusOr<std::vector<uint32_t>> ToIds(const KServeInput& input, const Contents& contents) {
  const Tensor& tensor = *input.tensor;
  ASSIGN_OR_RETURN(const int64_t elements, Elements(tensor));
  const auto expected = static_cast<size_t>(elements);
  if (input.raw.has_value() && input.raw->size() != expected * sizeof(Number)) {
    return WrongBytes(tensor, input.raw->size());
  }
  if (!input.raw.has_value() && static_cast<size_t>(contents.size()) != expected) {
    return WrongContents(tensor, static_cast<size_t>(contents.size()), expected);
  }
  const std::vector<Number> numbers =
      input.raw.has_value() ? RawNumbers<Number>(*input.raw) : std::vector<Number>(contents.begin(), contents.end());
  std::vector<uint32_t> ids;
  ids.reserve(numbers.size());
  for (const Number number : numbers) {
    if (std::cmp_less(number, 0) || std::cmp_greater(number, std::numeric_limits<uint32_t>::max())) {
      return InvalidField(absl::StrCat(tensor.name(), "[", ids.size(), "]"), absl::StrCat("is ", number));
    }
    ids.push_back(static_cast<uint32_t>(number));
  }
  return ids;
}

}  // namespace

absl::StatusOr<std::vector<KServeInput>> PairInputs(const inference::ModelInferRequest& request) {
  const int raw = request.raw_input_contents_size();
  if (raw != 0 && raw != request.inputs_size()) {
    return InvalidField("raw_input_contents",
                        absl::StrCat("has ", raw, " entries for ", request.inputs_size(), " inputs"));
  }
  std::vector<KServeInput> inputs;
  for (int i = 0; i < request.inputs_size(); ++i) {
    const Tensor& tensor = request.inputs(i);
    if (!tensor.parameters().empty()) {
      return InvalidField(Printable(tensor.name()),
                          absl::StrCat("has the parameter ", Printable(tensor.parameters().begin()->first),
                                       "; none is served here, shared memory neither"));
    }
    if (raw != 0 && tensor.has_contents()) {
      return InvalidField(Printable(tensor.name()), "has contents beside raw_input_contents");
    }
    inputs.push_back({&tensor, raw == 0 ? std::optional<absl::string_view>() : request.raw_input_contents(i)});
  }
  return inputs;
}

absl::StatusOr<std::string> BytesOf(const KServeInput& input) {
  const Tensor& tensor = *input.tensor;
  RETURN_IF_ERROR(CheckDatatype(tensor, "BYTES"));
  RETURN_IF_ERROR(CheckOneElement(tensor));
  if (!input.raw.has_value()) {
    const InferTensorContents& contents = tensor.contents();
    if (contents.bytes_contents_size() == 1) return contents.bytes_contents(0);
    return WrongContents(tensor, static_cast<size_t>(contents.bytes_contents_size()), 1);
  }
  // Four bytes say how long the element is.
  uint32_t length = 0;
  if (input.raw->size() >= sizeof(length)) std::memcpy(&length, input.raw->data(), sizeof(length));
  if (input.raw->size() != sizeof(length) + length) return WrongBytes(tensor, input.raw->size());
  return std::string(input.raw->substr(sizeof(length)));
}

absl::StatusOr<bool> FlagOf(const KServeInput& input) {
  const Tensor& tensor = *input.tensor;
  RETURN_IF_ERROR(CheckDatatype(tensor, "BOOL"));
  RETURN_IF_ERROR(CheckOneElement(tensor));
  if (!input.raw.has_value()) {
    const InferTensorContents& contents = tensor.contents();
    if (contents.bool_contents_size() == 1) return contents.bool_contents(0);
    return WrongContents(tensor, static_cast<size_t>(contents.bool_contents_size()), 1);
  }
  if (input.raw->size() != 1) return WrongBytes(tensor, input.raw->size());
  return input.raw->front() != 0;
}

absl::StatusOr<std::vector<uint32_t>> IdsOf(const KServeInput& input) {
  const Tensor& tensor = *input.tensor;
  const InferTensorContents& contents = tensor.contents();
  const std::string& datatype = tensor.datatype();
  // One prompt: a batch dimension in front of it is 1.
  if (tensor.shape_size() < 1 || tensor.shape_size() > 2 || (tensor.shape_size() == 2 && tensor.shape(0) != 1)) {
    return InvalidField(tensor.name(),
                        absl::StrCat("has the shape ", ShapeText(tensor), "; it must be [tokens] or [1, tokens]"));
  }
  if (datatype == "INT32") return ToIds<int32_t>(input, contents.int_contents());
  if (datatype == "UINT32") return ToIds<uint32_t>(input, contents.uint_contents());
  if (datatype == "INT64") return ToIds<int64_t>(input, contents.int64_contents());
  return InvalidField(tensor.name(),
                      absl::StrCat("has the datatype ", Printable(datatype), "; it must be INT32, UINT32 or INT64"));
}

void AddOutput(absl::string_view name, absl::string_view datatype, int64_t elements, std::string raw,
               inference::ModelInferResponse* response) {
  auto* const output = response->add_outputs();
  output->set_name(std::string(name));
  output->set_datatype(std::string(datatype));
  output->add_shape(elements);
  response->add_raw_output_contents()->swap(raw);
}

void AppendBytes(absl::string_view element, std::string* raw) {
  AppendNumber(static_cast<uint32_t>(element.size()), raw);
  raw->append(element.data(), element.size());
}

}  // namespace dejavu
