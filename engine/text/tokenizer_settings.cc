// The order of things is that of Transformers 5 (PreTrainedTokenizerBase._from_pretrained, then
// TokenizersBackend.__init__), because a token that the vocabulary lacks gets the next free id.
#include "engine/text/tokenizer_settings.h"

#include <algorithm>
#include <array>
#include <map>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/text/json_file.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

using nlohmann::json;

// PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES.
constexpr std::array<absl::string_view, 7> kRoles = {"bos_token", "eos_token", "unk_token", "sep_token",
                                                     "pad_token", "cls_token", "mask_token"};

// Names of another kind, with a string for a value, that are roles, too.
bool IsOtherRole(absl::string_view key) {
  return absl::EndsWith(key, "_token") && std::find(kRoles.begin(), kRoles.end(), key) == kRoles.end();
}

absl::Status ReadFlags(const std::string& file, const json& value, TokenToAdd* token) {
  for (const auto& [key, flag] : value.items()) {
    if (key == "content" || key == "id" || key == "__type") continue;
    bool TokenToAdd::*const field = key == "single_word" ? &TokenToAdd::single_word
                                    : key == "lstrip"    ? &TokenToAdd::lstrip
                                    : key == "rstrip"    ? &TokenToAdd::rstrip
                                    : key == "special"   ? &TokenToAdd::special
                                                         : nullptr;
    if (!flag.is_boolean() || (field == nullptr && key != "normalized")) {
      return Malformed(file, absl::StrCat("token ", QuotedText(token->content), " has ", QuotedText(key), ": ",
                                          QuotedText(flag.dump(-1, ' ', false, json::error_handler_t::replace)),
                                          ", which is no flag of a token"));
    }
    if (field != nullptr) {
      token->*field = flag.get<bool>();
    } else {
      token->normalized = flag.get<bool>();
    }
  }
  return absl::OkStatus();
}

// An object with "content" and flags.
absl::StatusOr<TokenToAdd> ReadToken(const std::string& file, const std::string& where, const json& value) {
  TokenToAdd token;
  if (!value.is_object() || !Member(value, "content").is_string()) {
    return Malformed(file, absl::StrCat(where, " has no \"content\""));
  }
  token.content = value["content"].get<std::string>();
  token.file = file;
  RETURN_IF_ERROR(ReadFlags(file, value, &token));
  return token;
}

TokenToAdd PlainToken(const std::string& file, std::string content) {
  TokenToAdd token;
  token.content = std::move(content);
  token.special = token.plain = true;
  token.file = file;
  return token;
}

bool Same(const TokenToAdd& a, const TokenToAdd& b) {
  const auto fields = [](const TokenToAdd& t) {
    return std::make_tuple(t.plain, t.content, t.single_word, t.lstrip, t.rstrip, t.special, t.is_normalized());
  };
  return a.plain == b.plain && (a.plain ? a.content == b.content : fields(a) == fields(b));
}

class SettingsReader {
 public:
  SettingsReader(const std::string& directory, const json* tokenizer_json)
      : directory_(directory), tokenizer_json_(tokenizer_json) {}
  absl::StatusOr<TokenizerSettings> Read();

 private:
  using Named = std::pair<std::string, std::optional<TokenToAdd>>;  // no token: the file says null

  std::string Path(const char* name) const { return absl::StrCat(directory_, "/", name); }

  absl::Status ReadConfig();
  absl::Status ChooseClass(const json& config);
  absl::Status ReadRole(const std::string& file, const std::string& key, const json& value, std::vector<Named>* roles);
  absl::Status ReadExtra(const std::string& file, const json& value);
  absl::Status ReadDecoder(const json& decoder);
  absl::Status ReadSpecialTokensMap();
  absl::Status ReadAddedTokensJson();
  absl::Status ReadTokensOfJson();
  absl::Status Remember(TokenToAdd token);
  std::optional<TokenToAdd> RoleOf(absl::string_view key) const;
  void Gather();
  void Add(TokenToAdd token);

  const std::string directory_;
  const json* const tokenizer_json_;
  TokenizerSettings settings_;
  std::vector<Named> roles_;        // bos_token and so on, the last of a name counts
  std::vector<Named> other_roles_;  // image_token and so on
  std::vector<TokenToAdd> extra_;
  bool has_extra_ = false;
  bool has_decoder_ = false;
  std::map<int64_t, TokenToAdd> decoder_;                         // by their ids
  absl::flat_hash_set<std::string> known_;                        // that need not be added again
  absl::flat_hash_map<std::string, std::vector<size_t>> places_;  // of a content among settings_.tokens; few
};

absl::StatusOr<TokenizerSettings> SettingsReader::Read() {
  RETURN_IF_ERROR(ReadConfig());
  if (!has_decoder_) {
    RETURN_IF_ERROR(ReadSpecialTokensMap());
    RETURN_IF_ERROR(ReadAddedTokensJson());
  }
  RETURN_IF_ERROR(ReadTokensOfJson());
  Gather();
  return std::move(settings_);
}

absl::StatusOr<bool> ReadFlag(const std::string& file, const json& config, const char* key) {
  const json& value = Member(config, key);
  if (value.is_null()) return false;
  if (value.is_boolean()) return value.get<bool>();
  return Malformed(file, absl::StrCat(key, " is neither true nor false"));
}

absl::Status SettingsReader::ReadConfig() {
  const std::string file = Path("tokenizer_config.json");
  json config = json::object();
  std::vector<std::string> keys;
  if (FileExists(file)) {
    ASSIGN_OR_RETURN(config, ReadJsonFile(file, &keys));
  }
  RETURN_IF_ERROR(ChooseClass(config));
  ASSIGN_OR_RETURN(settings_.add_prefix_space, ReadFlag(file, config, "add_prefix_space"));
  if (tokenizer_json_ == nullptr) {
    ASSIGN_OR_RETURN(settings_.add_bos_token, ReadFlag(file, config, "add_bos_token"));
    ASSIGN_OR_RETURN(settings_.add_eos_token, ReadFlag(file, config, "add_eos_token"));
  }
  constexpr char kCorrupts[] = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output";
  if (Member(config, kCorrupts) == true) return Malformed(file, absl::StrCat(kCorrupts, " is not supported"));
  for (const json& name : Member(config, "fast_tokenizer_files")) {
    if (name != "tokenizer.json") return Malformed(file, "fast_tokenizer_files names others than tokenizer.json");
  }
  const char* extra_key = Member(config, "extra_special_tokens").empty() && config.contains("additional_special_tokens")
                              ? "additional_special_tokens"
                              : "extra_special_tokens";
  if (config.contains(extra_key)) RETURN_IF_ERROR(ReadExtra(file, config[extra_key]));
  for (const std::string& key : keys) {
    const json& value = config[key];
    if (std::find(kRoles.begin(), kRoles.end(), key) != kRoles.end()) {
      RETURN_IF_ERROR(ReadRole(file, key, value, &roles_));
    } else if (IsOtherRole(key) && value.is_string()) {
      RETURN_IF_ERROR(ReadRole(file, key, value, &other_roles_));
    } else if (IsOtherRole(key) && value.is_object()) {
      return Malformed(file, absl::StrCat(key, " is not a string"));
    }
  }
  has_decoder_ = config.contains("added_tokens_decoder");
  return has_decoder_ ? ReadDecoder(config["added_tokens_decoder"]) : absl::OkStatus();
}

// Other classes cut texts in other ways.
absl::Status SettingsReader::ChooseClass(const json& config) {
  std::string file = Path("tokenizer_config.json");
  json name = Member(config, "tokenizer_class");
  if (config.contains("auto_map")) return Malformed(file, "auto_map is not supported: it names code");
  if (name.is_null() && FileExists(Path("config.json"))) {
    file = Path("config.json");
    ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(file, kMaxTextFileBytes));
    // Mostly it says nothing of it, and what else is in there others have to judge.
    if (absl::StrContains(text, "tokenizer_class")) {
      ASSIGN_OR_RETURN(const json model, ReadJsonFile(file, nullptr));
      name = Member(model, "tokenizer_class");
    }
  }
  if (name.is_null()) return absl::OkStatus();
  if (!name.is_string()) return Malformed(file, "tokenizer_class is not a string");
  absl::string_view base = name.get_ref<const std::string&>();
  if (absl::EndsWith(base, "Fast")) base.remove_suffix(4);
  if (base == "GPT2Tokenizer") return absl::OkStatus();
  settings_.generic = base == "PreTrainedTokenizer" || base == "TokenizersBackend";
  if (!settings_.generic) {
    return Malformed(file, absl::StrCat("tokenizer_class is ", QuotedText(name.get_ref<const std::string&>()),
                                        "; GPT2Tokenizer and PreTrainedTokenizerFast are supported"));
  }
  if (tokenizer_json_ == nullptr) {
    return Malformed(file, absl::StrCat("tokenizer_class is ", name.get_ref<const std::string&>(),
                                        ", which needs a tokenizer.json"));
  }
  return absl::OkStatus();
}

// "</s>", {"__type": "AddedToken", "content": "</s>", ...}, in the map {"content": "</s>", ...}, or null.
absl::Status SettingsReader::ReadRole(const std::string& file, const std::string& key, const json& value,
                                      std::vector<Named>* roles) {
  constexpr size_t kMostRoles = 1000;
  if (roles->size() == kMostRoles)
    return Malformed(file, absl::StrCat("more than ", kMostRoles, " tokens have a role"));
  if (value.is_null()) {
    roles->emplace_back(key, std::nullopt);
    return absl::OkStatus();
  }
  if (value.is_string()) {
    roles->emplace_back(key, PlainToken(file, value.get<std::string>()));
    return absl::OkStatus();
  }
  const bool of_map = absl::EndsWith(file, "special_tokens_map.json");
  if (!value.is_object() || (!of_map && Member(value, "__type") != "AddedToken")) {
    return Malformed(file, absl::StrCat(key, " does not name a token"));
  }
  ASSIGN_OR_RETURN(TokenToAdd token, ReadToken(file, key, value));
  token.special = token.special || of_map;
  roles->emplace_back(key, std::move(token));
  return absl::OkStatus();
}

absl::Status SettingsReader::ReadExtra(const std::string& file, const json& value) {
  has_extra_ = true;
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_array()) return Malformed(file, "the list of additional special tokens is not a list");
  for (const json& element : value) {
    if (element.is_string()) {
      extra_.push_back(PlainToken(file, element.get<std::string>()));
      continue;
    }
    if (!element.is_object() || Member(element, "__type") != "AddedToken") {
      return Malformed(file, "an additional special token is neither a string nor an AddedToken");
    }
    ASSIGN_OR_RETURN(TokenToAdd token, ReadToken(file, "an additional special token", element));
    extra_.push_back(std::move(token));
  }
  return absl::OkStatus();
}

// `id` under which a file has the token.
absl::Status SetId(int64_t id, TokenToAdd* token) {
  token->id = id;
  if (id >= 0 && id < kMaxTokens) return absl::OkStatus();
  return Malformed(token->file, absl::StrCat("the id of ", QuotedText(token->content), " is ", id,
                                             "; the limits are 0 and ", kMaxTokens - 1));
}

absl::Status SettingsReader::Remember(TokenToAdd token) {
  const auto [entry, is_new] = decoder_.try_emplace(*token.id, token);
  if (is_new || Same(entry->second, token)) return absl::OkStatus();
  if (entry->second.content != token.content) {
    return Malformed(token.file, absl::StrCat("id ", *token.id, " belongs to both ", QuotedText(entry->second.content),
                                              " and ", QuotedText(token.content)));
  }
  entry->second = std::move(token);
  return absl::OkStatus();
}

absl::Status SettingsReader::ReadDecoder(const json& decoder) {
  const std::string file = Path("tokenizer_config.json");
  if (!decoder.is_object()) return Malformed(file, "added_tokens_decoder is not an object");
  for (const auto& [key, value] : decoder.items()) {
    int64_t id;
    if (!absl::SimpleAtoi(key, &id) || !value.is_object()) {
      return Malformed(file, absl::StrCat("added_tokens_decoder[", QuotedText(key), "] is not a token under its id"));
    }
    ASSIGN_OR_RETURN(TokenToAdd token, ReadToken(file, absl::StrCat("the added token with id ", id), value));
    RETURN_IF_ERROR(SetId(id, &token));
    RETURN_IF_ERROR(Remember(std::move(token)));
  }
  return absl::OkStatus();
}

absl::Status SettingsReader::ReadSpecialTokensMap() {
  const std::string file = Path("special_tokens_map.json");
  if (!FileExists(file)) return absl::OkStatus();
  std::vector<std::string> keys;
  ASSIGN_OR_RETURN(const json map, ReadJsonFile(file, &keys));
  std::vector<Named> others;
  for (const std::string& key : keys) {
    const json& value = map[key];
    if (std::find(kRoles.begin(), kRoles.end(), key) != kRoles.end()) {
      RETURN_IF_ERROR(ReadRole(file, key, value, &roles_));
    } else if (IsOtherRole(key)) {
      RETURN_IF_ERROR(ReadRole(file, key, value, &others));
    } else if (key == "additional_special_tokens") {
      if (!has_extra_) RETURN_IF_ERROR(ReadExtra(file, value));
    } else if (key == "extra_special_tokens") {
      RETURN_IF_ERROR(ReadExtra(file, value));
    }
  }
  // Those of the map come first.
  other_roles_.insert(other_roles_.begin(), others.begin(), others.end());
  return absl::OkStatus();
}

// {"<new>": 50265}: of before Transformers had flags.
absl::Status SettingsReader::ReadAddedTokensJson() {
  const std::string file = Path("added_tokens.json");
  if (!FileExists(file)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const json added, ReadJsonFile(file, nullptr));
  absl::flat_hash_set<std::string> special;
  for (const absl::string_view key : kRoles) {
    const std::optional<TokenToAdd> token = RoleOf(key);
    if (token.has_value() && (token->plain || absl::EndsWith(token->file, "special_tokens_map.json"))) {
      special.insert(token->content);
    }
  }
  for (const TokenToAdd& token : extra_) special.insert(token.content);
  for (const auto& [content, id] : added.items()) {
    if (!id.is_number_integer()) {
      return Malformed(file, absl::StrCat("the id of ", QuotedText(content), " is not an integer"));
    }
    TokenToAdd token;
    token.content = content;
    token.special = special.contains(content);
    token.file = file;
    RETURN_IF_ERROR(SetId(id.get<int64_t>(), &token));
    RETURN_IF_ERROR(Remember(std::move(token)));
  }
  return absl::OkStatus();
}

absl::Status SettingsReader::ReadTokensOfJson() {
  if (tokenizer_json_ == nullptr) return absl::OkStatus();
  const std::string file = Path("tokenizer.json");
  const json& added = Member(*tokenizer_json_, "added_tokens");
  if (!added.is_null() && !added.is_array()) return Malformed(file, "added_tokens is not an array");
  for (const json& value : added) {
    if (!value.is_object() || !Member(value, "id").is_number_integer()) {
      return Malformed(file, "an entry of added_tokens has no integer \"id\"");
    }
    const auto id = value["id"].get<int64_t>();
    ASSIGN_OR_RETURN(TokenToAdd token, ReadToken(file, absl::StrCat("the added token with id ", id), value));
    RETURN_IF_ERROR(SetId(id, &token));
    if (settings_.generic) settings_.tokens_of_json.push_back(token);
    if (!has_decoder_) RETURN_IF_ERROR(Remember(std::move(token)));
  }
  return absl::OkStatus();
}

// What was read last counts.
std::optional<TokenToAdd> SettingsReader::RoleOf(absl::string_view key) const {
  const auto role = std::find_if(roles_.rbegin(), roles_.rend(), [&](const Named& r) { return r.first == key; });
  return role == roles_.rend() ? std::nullopt : role->second;
}

void SettingsReader::Add(TokenToAdd token) {
  if (known_.contains(token.content)) return;
  std::vector<size_t>& places = places_[token.content];
  for (const size_t place : places) {
    if (Same(token, settings_.tokens[place])) return;
  }
  places.push_back(settings_.tokens.size());
  settings_.tokens.push_back(std::move(token));
}

// As TokenizersBackend.__init__: first the added tokens by their ids, then what has a role, then the rest.
void SettingsReader::Gather() {
  std::vector<Named> roles;
  for (const absl::string_view key : kRoles) {
    const bool named = std::any_of(roles_.begin(), roles_.end(), [&](const Named& role) { return role.first == key; });
    if (!named && !settings_.generic && (key == "bos_token" || key == "eos_token" || key == "unk_token")) {
      roles.emplace_back(key, PlainToken(directory_, "<|endoftext|>"));  // the class has it so
    } else {
      roles.emplace_back(key, RoleOf(key));
    }
  }
  for (const Named& named : other_roles_) {
    const auto same = std::find_if(roles.begin(), roles.end(), [&](const Named& r) { return r.first == named.first; });
    if (same == roles.end()) {
      roles.push_back(named);
    } else {
      same->second = named.second;
    }
  }
  settings_.bos = roles[0].second.has_value() ? std::optional(roles[0].second->content) : std::nullopt;
  settings_.eos = roles[1].second.has_value() ? std::optional(roles[1].second->content) : std::nullopt;

  for (const TokenToAdd& token : settings_.tokens_of_json) known_.insert(token.content);
  absl::flat_hash_set<std::string> with_role;
  for (const Named& named : roles) {
    if (named.second.has_value()) with_role.insert(named.second->content);
  }
  for (auto& [id, token] : decoder_) {
    known_.insert(token.content);
    settings_.tokens.push_back(std::move(token));
  }
  for (Named& named : roles) {
    if (named.second.has_value()) Add(*std::move(named.second));
  }
  for (TokenToAdd& token : extra_) Add(std::move(token));
  for (TokenToAdd& token : settings_.tokens) token.special = token.special || with_role.contains(token.content);
}

}  // namespace

absl::StatusOr<TokenizerSettings> ReadTokenizerSettings(const std::string& directory, const json* tokenizer_json) {
  return SettingsReader(directory, tokenizer_json).Read();
}

}  // namespace dejavu
