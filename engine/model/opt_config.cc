// The fields and their defaults are those of Transformers' OPTConfig, which leaves out of config.json what equals a
// default.
#include "engine/model/opt_config.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
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

  bool Bool(const char* name, bool absent) {
    const auto field = document_.find(name);
    if (field == document_.end()) return absent;
    if (!field->is_boolean()) return Refuse(name, *field, "true or false is needed"), absent;
    return field->get<bool>();
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
    const std::string shown = value.is_structured() ? value.type_name() : value.dump(-1, ' ', true).substr(0, 100);
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

}  // namespace

absl::StatusOr<OptConfig> OptConfig::Load(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/config.json");
  ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(path, kMaxConfigBytes));
  ASSIGN_OR_RETURN(const json document, ParseJsonObject(text, path));
  Fields fields(document, path);
  RETURN_IF_ERROR(CheckArchitecture(document, fields, path));
  fields.Only("activation_function", "relu");
  fields.Only("tie_word_embeddings", true);
  fields.Only("quantization_config", nullptr);

  OptConfig config;
  config.hidden = fields.Integer("hidden_size", 768, 1, 1 << 16);
  config.layers = fields.Integer("num_hidden_layers", 12, 1, 1 << 10);
  config.heads = fields.Integer("num_attention_heads", 12, 1, 1 << 10);
  config.ffn = fields.Integer("ffn_dim", 3072, 1, 1 << 18);
  config.vocab = fields.Integer("vocab_size", 50272, 1, 1 << 20);
  config.context = fields.Integer("max_position_embeddings", 2048, 1, 1 << 20);
  config.embed = fields.Integer("word_embed_proj_dim", config.hidden, 1, 1 << 16);
  config.pre_norm = fields.Bool("do_layer_norm_before", true);
  config.final_norm = config.pre_norm && !fields.Bool("_remove_final_layer_norm", false);
  config.biases = fields.Bool("enable_bias", true);
  config.affine_norms = fields.Bool("layer_norm_elementwise_affine", true);
  config.bos_token = fields.Integer("bos_token_id", 2, 0, config.vocab - 1);
  config.eos_token = fields.Integer("eos_token_id", 2, 0, config.vocab - 1);
  RETURN_IF_ERROR(fields.status());
  if (config.hidden % config.heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": hidden_size is ", config.hidden,
                                                   "; it must be a multiple of num_attention_heads, ", config.heads));
  }
  config.head_dim = config.hidden / config.heads;
  return config;
}

}  // namespace dejavu
