// The fields, their types and their defaults are those of Transformers' OPTConfig, which leaves out of config.json what
// equals a default. The end tokens are those of generation_config.json where there is one, even where it names none.
#include "engine/model/opt_config.h"

#include <algorithm>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "engine/formats/json_text.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int64_t kMaxConfigBytes = int64_t{1} << 20;

using nlohmann::json;

// Reads typed fields; keeps the first thing that is wrong and gives defaults from then on.
class Fields {
 public:
  Fields(const json& document, const std::string& path) : document_(document), path_(path) {}

  int32_t Integer(const char* name, int32_t absent, int32_t least, int32_t most) {
    const json field = document_.value(name, json(absent));
    if (!field.is_number_integer()) return Refuse(name, field, "an integer is needed"), absent;
    // Unsigned values beyond int64 are far beyond `most`; as int64 they would be negative.
    const bool huge = field.is_number_unsigned() && field.get<uint64_t>() > INT32_MAX;
    const int64_t value = huge ? INT32_MAX + int64_t{1} : field.get<int64_t>();
    if (value < least || value > most) {
      return Refuse(name, field, absl::StrCat(least, " to ", most, " are supported")), absent;
    }
    return static_cast<int32_t>(value);
  }

  bool IsNull(const char* name) const {
    const auto field = document_.find(name);
    return field != document_.end() && field->is_null();
  }

  bool Bool(const char* name, bool absent) {
    const auto field = document_.find(name);
    if (field == document_.end()) return absent;
    if (!field->is_boolean()) return Refuse(name, *field, "true or false is needed"), absent;
    return field->get<bool>();
  }

  void Number(const char* name) {
    const auto field = document_.find(name);
    if (field == document_.end() || field->is_number()) return;
    for (const char* constant : {"NaN", "Infinity", "-Infinity"}) {
      if (*field == constant) return;  // JsonDialect::kPython
    }
    Refuse(name, *field, "a number is needed");
  }

  // Ids of tokens. Those that are not in the vocabulary never come: they are left out.
  std::vector<int32_t> Tokens(const char* name, const json& absent, int32_t vocab, bool list_is_allowed) {
    const json field = document_.value(name, absent);
    std::vector<int32_t> tokens;
    const auto add = [&](const json& id) {
      if (!id.is_number_integer() || (id.is_number_unsigned() && id.get<uint64_t>() > INT64_MAX)) return false;
      const auto token = id.get<int64_t>();
      if (tokens.size() > kMostEndTokens) return true;  // there are too many, and each is looked for among all
      const bool is_new = std::find(tokens.begin(), tokens.end(), token) == tokens.end();
      if (token >= 0 && token < vocab && is_new) tokens.push_back(static_cast<int32_t>(token));
      return true;
    };
    if (field.is_null() || add(field)) return tokens;
    if (!list_is_allowed) return Refuse(name, field, "an integer or null is needed"), tokens;
    if (!field.is_array() || !std::all_of(field.begin(), field.end(), add)) {
      Refuse(name, field, "an integer, a list of integers or null is needed");
    } else if (tokens.size() > kMostEndTokens) {
      Refuse(name, field, absl::StrCat("a list of more than ", kMostEndTokens, " tokens, the most that are supported"));
    }
    return tokens;
  }

  // The only supported value, which is also the default.
  void Only(const char* name, const json& supported) {
    const auto field = document_.find(name);
    if (field != document_.end() && *field != supported) {
      Refuse(name, *field, absl::StrCat("only ", supported.dump(), " is supported"));
    }
  }

  void Refuse(const char* name, const json& value, absl::string_view reason) {
    if (!status_.ok()) return;
    const std::string shown = value.dump(-1, ' ', true).substr(0, 100);
    status_ = absl::InvalidArgumentError(absl::StrCat(path_, ": ", name, " is ", shown, "; ", reason));
  }

  const absl::Status& status() const { return status_; }

 private:
  const json& document_;
  const std::string path_;
  absl::Status status_;
};

absl::Status CheckArchitecture(const json& document, Fields& fields, const std::string& path) {
  const auto type = document.find("model_type");
  if (type != document.end()) {
    fields.Only("model_type", "opt");
    return fields.status();
  }
  const auto architectures = document.find("architectures");
  if (architectures != document.end() && architectures->is_array()) {
    for (const json& name : *architectures) {
      if (name == "OPTForCausalLM" || name == "OPTModel") return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": neither model_type \"opt\" nor an OPT model in architectures; only OPT is supported"));
}

absl::StatusOr<json> ReadDocument(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(path, kMaxConfigBytes));
  return ParseJsonObject(text, path, JsonDialect::kPython);
}

// Of generation_config.json, if there is one.
absl::Status ReadGeneration(const std::string& path, OptConfig* config) {
  const absl::StatusOr<json> document = ReadDocument(path);
  if (absl::IsNotFound(document.status())) return absl::OkStatus();
  RETURN_IF_ERROR(document.status());
  Fields fields(*document, path);
  config->eos_tokens = fields.Tokens("eos_token_id", nullptr, config->vocab, /*list_is_allowed=*/true);
  for (const auto& [name, value] : document->items()) {
    const bool is_setting = name[0] != '_' && !absl::EndsWith(name, "os_token_id") && name != "pad_token_id" &&
                            name != "transformers_version" && name != "use_cache";
    if (is_setting && !value.is_null()) config->unused_settings.push_back(Quoted(name));
  }
  return fields.status();
}

}  // namespace

absl::StatusOr<OptConfig> OptConfig::Load(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/config.json");
  ASSIGN_OR_RETURN(const json document, ReadDocument(path));
  Fields fields(document, path);
  RETURN_IF_ERROR(CheckArchitecture(document, fields, path));
  fields.Only("activation_function", "relu");
  for (const char* name : {"quantization_config", "transformers_weights", "per_layer_config"})
    fields.Only(name, nullptr);
  fields.Only("is_encoder_decoder", false);
  fields.Bool("use_cache", true);
  for (const char* name : {"dropout", "attention_dropout", "layerdrop", "init_std"}) fields.Number(name);

  OptConfig config;
  config.hidden = fields.Integer("hidden_size", 768, 1, 1 << 16);
  config.layers = fields.Integer("num_hidden_layers", 12, 1, 1 << 10);
  config.heads = fields.Integer("num_attention_heads", 12, 1, 1 << 10);
  config.ffn = fields.Integer("ffn_dim", 3072, 1, 1 << 18);
  config.vocab = fields.Integer("vocab_size", 50272, 1, 1 << 20);
  config.context = fields.Integer("max_position_embeddings", 2048, 1, 1 << 20);
  config.embed = fields.IsNull("word_embed_proj_dim")
                     ? config.hidden
                     : fields.Integer("word_embed_proj_dim", config.hidden, 1, 1 << 16);
  config.pre_norm = fields.Bool("do_layer_norm_before", true);
  config.final_norm = config.pre_norm && !fields.Bool("_remove_final_layer_norm", false);
  config.biases = fields.Bool("enable_bias", true);
  config.affine_norms = fields.Bool("layer_norm_elementwise_affine", true);
  config.tied = fields.Bool("tie_word_embeddings", true);
  const std::vector<int32_t> begin = fields.Tokens("bos_token_id", 2, config.vocab, /*list_is_allowed=*/false);
  config.bos_token = begin.empty() ? std::nullopt : std::optional(begin[0]);
  config.eos_tokens = fields.Tokens("eos_token_id", 2, config.vocab, /*list_is_allowed=*/true);
  // No text is padded here, but Transformers wants the row to be there; it counts negative ones from the end.
  if (!fields.IsNull("pad_token_id")) fields.Integer("pad_token_id", 0, -config.vocab, config.vocab - 1);
  RETURN_IF_ERROR(fields.status());
  if (config.hidden % config.heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": hidden_size is ", config.hidden,
                                                   "; it must be a multiple of num_attention_heads, ", config.heads));
  }
  config.head_dim = config.hidden / config.heads;
  RETURN_IF_ERROR(ReadGeneration(absl::StrCat(directory, "/generation_config.json"), &config));
  return config;
}

}  // namespace dejavu
