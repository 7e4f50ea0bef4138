#include "server/api/sampling_parameters.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

using nlohmann::json;

constexpr int kMostDepth = 8;
// Room for allowed_token_ids of a whole vocabulary. A parsed value may take thirty times its text.
constexpr size_t kMostBytes = 512 << 10;
constexpr int64_t kMostCount = std::numeric_limits<uint32_t>::max();

// As a message may show it, however long it is.
std::string Shown(const json& value) { return Printable(value.dump(-1, ' ', true, json::error_handler_t::replace)); }

absl::StatusOr<double> ToNumber(absl::string_view name, const json& value) {
  double number = 0.0;
  if (value.is_number()) return value.get<double>();
  if (value.is_string() && absl::SimpleAtod(value.get<std::string>(), &number)) return number;
  return InvalidField(name, absl::StrCat("is ", Shown(value), "; it must be a number"));
}

// Beyond 64 bits it is no whole number.
absl::StatusOr<int64_t> ToWhole(absl::string_view name, const json& value, int64_t low, int64_t high) {
  int64_t number = 0;
  bool whole = false;
  if (value.is_number_unsigned()) {
    whole = value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    if (whole) number = value.get<int64_t>();
  } else if (value.is_number_integer()) {
    whole = true;
    number = value.get<int64_t>();
  } else if (value.is_number_float()) {
    const double real = value.get<double>();
    whole = std::abs(real) <= 9e15 && real == std::floor(real);
    if (whole) number = static_cast<int64_t>(real);
  } else if (value.is_string()) {
    whole = absl::SimpleAtoi(value.get<std::string>(), &number);
  }
  if (whole && low <= number && number <= high) return number;
  return InvalidField(name, absl::StrCat("is ", Shown(value), "; it must be a whole number in ", low, " ... ", high));
}

absl::StatusOr<uint32_t> ToCount(absl::string_view name, const json& value) {
  ASSIGN_OR_RETURN(const int64_t number, ToWhole(name, value, 0, kMostCount));
  return static_cast<uint32_t>(number);
}

absl::StatusOr<bool> ToFlag(absl::string_view name, const json& value) {
  if (value.is_boolean()) return value.get<bool>();
  return InvalidField(name, absl::StrCat("is ", Shown(value), "; it must be true or false"));
}

absl::StatusOr<std::vector<uint32_t>> ToIds(absl::string_view name, const json& value) {
  if (!value.is_array()) return InvalidField(name, absl::StrCat("is ", Shown(value), "; it must be a list of ids"));
  std::vector<uint32_t> ids;
  for (const json& id : value) {
    ASSIGN_OR_RETURN(ids.emplace_back(), ToCount(absl::StrCat(name, "[", ids.size(), "]"), id));
  }
  return ids;
}

using Set = absl::Status (*)(absl::string_view name, const json& value, v1::GenerateRequest* request);

// A parameter that is a float or a count of the request's.
template <auto kMutable, auto kSet>
absl::Status SetReal(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const double number, ToNumber(name, value));
  ((request->*kMutable)()->*kSet)(static_cast<float>(number));
  return absl::OkStatus();
}
template <auto kMutable, auto kSet>
absl::Status SetCount(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const uint32_t number, ToCount(name, value));
  ((request->*kMutable)()->*kSet)(number);
  return absl::OkStatus();
}
template <auto kMutable, auto kSet>
absl::Status SetFlag(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const bool flag, ToFlag(name, value));
  ((request->*kMutable)()->*kSet)(flag);
  return absl::OkStatus();
}

absl::Status SetTopK(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const int64_t top_k, ToWhole(name, value, -1, kMostCount));
  request->mutable_sampling()->set_top_k(static_cast<uint32_t>(std::max<int64_t>(top_k, 0)));  // -1: all
  return absl::OkStatus();
}

absl::Status SetSeed(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  if (value.is_number_unsigned()) {
    request->mutable_sampling()->set_seed(value.get<uint64_t>());
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const int64_t seed, ToWhole(name, value, -1, std::numeric_limits<int64_t>::max()));
  if (seed >= 0) request->mutable_sampling()->set_seed(static_cast<uint64_t>(seed));  // -1: none is named
  return absl::OkStatus();
}

absl::Status SetStop(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  const json strings = value.is_string() ? json::array({value}) : value;
  if (!strings.is_array()) {
    return InvalidField(name, absl::StrCat("is ", Shown(value), "; it must be a string or a list of strings"));
  }
  for (const json& stop : strings) {
    if (!stop.is_string()) return InvalidField(name, absl::StrCat("holds ", Shown(stop), ", which is no string"));
    request->mutable_stopping()->add_stop_strings(stop.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status SetStopIds(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, ToIds(name, value));
  request->mutable_stopping()->mutable_stop_token_ids()->Add(ids.begin(), ids.end());
  return absl::OkStatus();
}

absl::Status SetAllowedIds(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, ToIds(name, value));
  if (ids.empty()) return InvalidField(name, "is empty; it would leave nothing to sample");
  request->mutable_penalties()->mutable_allowed_token_ids()->Add(ids.begin(), ids.end());
  return absl::OkStatus();
}

absl::Status SetBias(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  if (!value.is_object()) return InvalidField(name, absl::StrCat("is ", Shown(value), "; it must map ids to numbers"));
  for (const auto& [key, bias] : value.items()) {
    const std::string field = absl::StrCat(name, "[", Printable(key), "]");
    uint32_t id = 0;
    if (!absl::SimpleAtoi(key, &id)) return InvalidField(field, "names no token id");
    ASSIGN_OR_RETURN(const double number, ToNumber(field, bias));
    (*request->mutable_penalties()->mutable_logit_bias())[id] = static_cast<float>(number);
  }
  return absl::OkStatus();
}

absl::Status SetLogprobs(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const uint32_t top, ToCount(name, value));  // -1, all of the vocabulary, is refused
  request->mutable_output()->set_logprobs(true);
  request->mutable_output()->set_top_logprobs(top);
  return absl::OkStatus();
}

absl::Status SetPromptLogprobs(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const uint32_t top, ToCount(name, value));
  request->mutable_output()->set_prompt_logprobs(true);
  request->mutable_output()->set_prompt_top_logprobs(top);
  return absl::OkStatus();
}

absl::Status SetTruncation(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  ASSIGN_OR_RETURN(const int64_t tokens, ToWhole(name, value, -1, std::numeric_limits<int32_t>::max()));
  request->set_truncate_prompt_tokens(static_cast<int32_t>(tokens));
  return absl::OkStatus();
}

// Spaces between special tokens, which are left out of the text anyway.
absl::Status SetNothing(absl::string_view name, const json& value, v1::GenerateRequest* /*request*/) {
  return ToFlag(name, value).status();
}

struct Parameter {
  absl::string_view name;
  Set set;
};

constexpr auto kSampling = &v1::GenerateRequest::mutable_sampling;
constexpr auto kPenalties = &v1::GenerateRequest::mutable_penalties;
constexpr auto kStopping = &v1::GenerateRequest::mutable_stopping;

constexpr Parameter kParameters[] = {
    {"n", SetCount<kSampling, &v1::Sampling::set_samples>},
    {"presence_penalty", SetReal<kPenalties, &v1::Penalties::set_presence>},
    {"frequency_penalty", SetReal<kPenalties, &v1::Penalties::set_frequency>},
    {"repetition_penalty", SetReal<kPenalties, &v1::Penalties::set_repetition>},
    {"temperature", SetReal<kSampling, &v1::Sampling::set_temperature>},
    {"top_p", SetReal<kSampling, &v1::Sampling::set_top_p>},
    {"top_k", SetTopK},
    {"min_p", SetReal<kSampling, &v1::Sampling::set_min_p>},
    {"seed", SetSeed},
    {"stop", SetStop},
    {"stop_token_ids", SetStopIds},
    {"ignore_eos", SetFlag<kStopping, &v1::Stopping::set_ignore_eos>},
    {"max_tokens", SetCount<kStopping, &v1::Stopping::set_max_new_tokens>},
    {"min_tokens", SetCount<kStopping, &v1::Stopping::set_min_new_tokens>},
    {"include_stop_str_in_output", SetFlag<kStopping, &v1::Stopping::set_include_stop_string>},
    {"logprobs", SetLogprobs},
    {"prompt_logprobs", SetPromptLogprobs},
    {"truncate_prompt_tokens", SetTruncation},
    {"logit_bias", SetBias},
    {"allowed_token_ids", SetAllowedIds},
    {"spaces_between_special_tokens", SetNothing},
};

// Parameters of vLLM that have one value here, as JSON.
struct Fixed {
  absl::string_view name, value;
};
constexpr Fixed kFixed[] = {{"best_of", "1"},
                            {"detokenize", "true"},
                            {"skip_special_tokens", "true"},
                            {"use_beam_search", "false"},
                            {"length_penalty", "1"},
                            {"early_stopping", "false"},
                            {"bad_words", "[]"},
                            {"guided_decoding", ""},
                            {"structured_outputs", ""},
                            {"lora_name", ""},
                            {"logits_processors", ""},
                            {"extra_args", ""}};

absl::Status ReadOne(absl::string_view name, const json& value, v1::GenerateRequest* request) {
  for (const Parameter& parameter : kParameters) {
    if (parameter.name == name) return parameter.set(name, value, request);
  }
  for (const Fixed& fixed : kFixed) {
    if (fixed.name != name) continue;
    if (fixed.value.empty()) return InvalidField(name, "is not served here");
    if (value == json::parse(fixed.value)) return absl::OkStatus();
    return InvalidField(name, absl::StrCat("is ", Shown(value), "; only ", fixed.value, " is served here"));
  }
  return InvalidField(Printable(name), "is no sampling parameter");
}

// How deep the brackets of a JSON text go; of one that is malformed, at least as deep as a parser gets.
int Depth(absl::string_view text) {
  int depth = 0, most = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"') in_string = !in_string;
    if (in_string) {
      if (c == '\\') ++i;  // what is escaped ends no string
    } else if (c == '[' || c == '{') {
      most = std::max(most, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return most;
}

}  // namespace

void SetVllmDefaults(v1::GenerateRequest* request) {
  request->mutable_sampling()->set_temperature(1.0f);
  request->mutable_stopping()->set_max_new_tokens(16);
}

absl::Status ReadSamplingParameters(const json& parameters, v1::GenerateRequest* request) {
  if (!parameters.is_object()) {
    return InvalidField("sampling_parameters", absl::StrCat("is ", Shown(parameters), "; it must be an object"));
  }
  for (const auto& [name, value] : parameters.items()) {
    if (!value.is_null()) RETURN_IF_ERROR(ReadOne(name, value, request));
  }
  return absl::OkStatus();
}

absl::Status ReadSamplingText(absl::string_view text, v1::GenerateRequest* request) {
  constexpr char kField[] = "sampling_parameters";
  if (text.size() > kMostBytes) {
    return InvalidField(kField, absl::StrCat("has ", text.size(), " bytes; at most ", kMostBytes, " are allowed"));
  }
  if (!IsValidUtf8(text)) return InvalidField(kField, "is not valid UTF-8");
  // What lies deeper is never made: copies and comparisons go down by recursion.
  if (Depth(text) > kMostDepth) {
    return InvalidField(kField, absl::StrCat("is nested deeper than ", kMostDepth, " levels"));
  }
  // Without a callback, with which the parser takes time quadratic in the length of an array of objects.
  const json parameters = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (parameters.is_discarded()) return InvalidField(kField, "is not JSON");
  return ReadSamplingParameters(parameters, request);
}

absl::Span<const FieldName> VllmNames() {
  static constexpr FieldName kNames[] = {{"sampling.samples", "n"},
                                         {"sampling.", ""},
                                         {"penalties.repetition", "repetition_penalty"},
                                         {"penalties.presence", "presence_penalty"},
                                         {"penalties.frequency", "frequency_penalty"},
                                         {"penalties.", ""},
                                         {"stopping.max_new_tokens", "max_tokens"},
                                         {"stopping.min_new_tokens", "min_tokens"},
                                         {"stopping.stop_strings", "stop"},
                                         {"stopping.", ""},
                                         {"output.top_logprobs", "logprobs"},
                                         {"output.prompt_top_logprobs", "prompt_logprobs"},
                                         {"token_ids.ids", "input_ids"},
                                         {"token_ids", "input_ids"}};
  return kNames;
}

}  // namespace dejavu
