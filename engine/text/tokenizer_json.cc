#include "engine/text/tokenizer_json.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/text/json_file.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

using nlohmann::json;

bool IsOff(const json& value) {
  return value.is_null() || value == false || value == 0 ||
         (value.is_string() && value.get_ref<const std::string&>().empty());
}

std::string TypeOf(const json& part) {
  const json& type = part.is_object() ? Member(part, "type") : part;
  return type.is_string() ? QuotedText(type.get_ref<const std::string&>()) : "not named";
}

// The parts that `part` consists of: it may be a Sequence, which holds them under `list`, and may hold Sequences.
// Null has none.
absl::Status Flatten(const std::string& file, const std::string& field, const json& part, const char* list,
                     std::vector<const json*>* parts) {
  if (part.is_null()) return absl::OkStatus();
  if (!part.is_object()) return Malformed(file, absl::StrCat(field, " is not an object"));
  if (Member(part, "type") != "Sequence") {
    parts->push_back(&part);
    return absl::OkStatus();
  }
  const json& elements = Member(part, list);
  if (!elements.is_array()) return Malformed(file, absl::StrCat(field, ".", list, " is not an array"));
  for (const json& element : elements) {
    if (element.is_null()) return Malformed(file, absl::StrCat(field, ".", list, " holds null"));
    RETURN_IF_ERROR(Flatten(file, field, element, list, parts));
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> Flag(const std::string& file, const std::string& field, const json& value, bool otherwise) {
  if (value.is_null()) return otherwise;
  if (value.is_boolean()) return value.get<bool>();
  return Malformed(file, absl::StrCat(field, " is neither true nor false"));
}

absl::Status CheckModel(const std::string& file, const json& model) {
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!IsOff(Member(model, key))) return Malformed(file, absl::StrCat("model.", key, " is not supported"));
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> IdOf(const std::string& file, const std::string& field, const json& id) {
  if (id.is_number_integer()) return id.get<int64_t>();
  return Malformed(file, absl::StrCat(field, " is not an integer"));
}

// {"sep": ["</s>", 2], "cls": ["<s>", 0]}
absl::StatusOr<Surroundings> ReadBertProcessing(const std::string& file, const json& part) {
  Surroundings found;
  for (const auto& [key, ids] : {std::pair("cls", &found.before), std::pair("sep", &found.behind)}) {
    const json& token = Member(part, key);
    const std::string field = absl::StrCat("post_processor.", key);
    if (!token.is_array() || token.size() != 2) {
      return Malformed(file, absl::StrCat(field, " is not a token with its id"));
    }
    ASSIGN_OR_RETURN(const int64_t id, IdOf(file, field, token[1]));
    ids->push_back(id);
  }
  return found;
}

// "single": what becomes of one text, among special tokens.
absl::StatusOr<Surroundings> ReadTemplate(const std::string& file, const json& part) {
  const json& single = Member(part, "single");
  if (!single.is_array()) return Malformed(file, "post_processor.single is not an array");
  Surroundings found;
  int texts = 0;
  for (const json& piece : single) {
    if (!piece.is_object()) return Malformed(file, "post_processor.single holds what is not an object");
    if (piece.contains("Sequence")) {
      if (!piece["Sequence"].is_object() || Member(piece["Sequence"], "id") != "A" || ++texts > 1) {
        return Malformed(file, "post_processor.single does not hold the text A once");
      }
      continue;
    }
    const json& special = Member(piece, "SpecialToken");
    const json& name = special.is_object() ? Member(special, "id") : special;
    const json& tokens = Member(part, "special_tokens");
    const json& token =
        tokens.is_object() && name.is_string() ? Member(tokens, name.get_ref<const std::string&>()) : name;
    const json* ids = token.is_object() ? &Member(token, "ids") : nullptr;
    if (ids == nullptr || !ids->is_array()) {
      return Malformed(file, "post_processor.single holds a token that post_processor.special_tokens does not");
    }
    for (const json& element : *ids) {
      ASSIGN_OR_RETURN(const int64_t id, IdOf(file, "post_processor.special_tokens", element));
      (texts == 0 ? found.before : found.behind).push_back(id);
    }
  }
  if (texts == 0) return Malformed(file, "post_processor.single does not hold the text A once");
  return found;
}

}  // namespace

absl::Status CheckIsBpe(const std::string& file, const json& root) {
  const json& version = Member(root, "version");
  if (!version.is_null() && version != "1.0") return Malformed(file, "version is not \"1.0\"");
  const json& model = Member(root, "model");
  if (!model.is_object()) return Malformed(file, "model is not an object");
  const json& type = Member(model, "type");
  if (!type.is_null() && type != "BPE") return Malformed(file, "model.type is not \"BPE\"");
  return absl::OkStatus();
}

absl::StatusOr<TextPipeline> ReadTextPipeline(const std::string& file, const json& root) {
  TextPipeline pipeline;
  const json& model = Member(root, "model");
  RETURN_IF_ERROR(CheckModel(file, model));
  ASSIGN_OR_RETURN(pipeline.ignore_merges,
                   Flag(file, "model.ignore_merges", Member(model, "ignore_merges"), /*otherwise=*/false));

  std::vector<const json*> parts;
  RETURN_IF_ERROR(Flatten(file, "normalizer", Member(root, "normalizer"), "normalizers", &parts));
  if (!parts.empty()) return Malformed(file, absl::StrCat("normalizer ", TypeOf(*parts[0]), " is not supported"));

  RETURN_IF_ERROR(Flatten(file, "pre_tokenizer", Member(root, "pre_tokenizer"), "pretokenizers", &parts));
  if (parts.size() != 1 || Member(*parts[0], "type") != "ByteLevel") {
    return Malformed(file, "pre_tokenizer.type is not \"ByteLevel\"");
  }
  ASSIGN_OR_RETURN(pipeline.add_prefix_space, Flag(file, "pre_tokenizer.add_prefix_space",
                                                   Member(*parts[0], "add_prefix_space"), /*otherwise=*/true));
  ASSIGN_OR_RETURN(pipeline.splits_words,
                   Flag(file, "pre_tokenizer.use_regex", Member(*parts[0], "use_regex"), /*otherwise=*/true));

  parts.clear();
  RETURN_IF_ERROR(Flatten(file, "decoder", Member(root, "decoder"), "decoders", &parts));
  if (parts.size() != 1 || Member(*parts[0], "type") != "ByteLevel") {
    return Malformed(file, "decoder.type is not \"ByteLevel\"");
  }
  return pipeline;
}

absl::StatusOr<Surroundings> ReadPostProcessor(const std::string& file, const json& root) {
  std::vector<const json*> parts;
  RETURN_IF_ERROR(Flatten(file, "post_processor", Member(root, "post_processor"), "processors", &parts));
  Surroundings found;
  bool any = false;
  for (const json* part : parts) {
    const json& type = Member(*part, "type");
    if (type == "ByteLevel") continue;
    // A second one would take the first one's tokens for another text.
    if (any) return Malformed(file, "post_processor adds tokens twice, which is not supported");
    any = true;
    if (type == "TemplateProcessing") {
      ASSIGN_OR_RETURN(found, ReadTemplate(file, *part));
    } else if (type == "RobertaProcessing" || type == "BertProcessing") {
      ASSIGN_OR_RETURN(found, ReadBertProcessing(file, *part));
    } else {
      return Malformed(file, absl::StrCat("post_processor ", TypeOf(*part), " is not supported"));
    }
  }
  return found;
}

}  // namespace dejavu
