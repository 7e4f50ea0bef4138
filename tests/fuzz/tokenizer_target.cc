// The tokenizer and the way back: bytes in, ids, the same bytes; ids in, one token at a time, text that is UTF-8 at
// every moment and in all what Decode gives.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine/text/tokenizer.h"
#include "kernels/base/utf8.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

// Whether some character's UTF-8 begins with `bytes`, by its code point's range.
bool BeginsACharacter(absl::string_view bytes) {
  struct Form {
    uint32_t least, most;
    int length;
  };
  for (const Form& form : {Form{0, 0x7F, 1}, Form{0x80, 0x7FF, 2}, Form{0x800, 0xD7FF, 3}, Form{0xE000, 0xFFFF, 3},
                           Form{0x10000, 0x10FFFF, 4}}) {
    if (bytes.size() > static_cast<size_t>(form.length)) continue;
    // The least and the most code point with these bytes at its front.
    const int missing = 6 * (form.length - static_cast<int>(bytes.size()));
    const uint32_t lead_bits = form.length == 1 ? 0x7F : 0x7F >> form.length;
    const uint32_t lead_mark = form.length == 1 ? 0 : 0xFF & ~(0xFFu >> form.length);
    const auto lead = static_cast<uint8_t>(bytes[0]);
    if ((lead & ~lead_bits) != lead_mark) continue;
    uint32_t code = lead & lead_bits;
    bool continued = true;
    for (const char c : bytes.substr(1)) {
      continued = continued && (static_cast<uint8_t>(c) & 0xC0) == 0x80;
      code = code << 6 | (static_cast<uint8_t>(c) & 0x3F);
    }
    const uint32_t first = code << missing, last = first | ((1u << missing) - 1);
    if (continued && first <= form.most && last >= form.least) return true;
  }
  return false;
}

// Each longest stretch that begins a character and is none becomes U+FFFD, and so does a byte that begins none.
std::string Repaired(absl::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    size_t length = 1;
    while (length < bytes.size() && BeginsACharacter(bytes.substr(0, length + 1))) ++length;
    // A character is not followed by bytes that would still belong to it.
    const bool whole = BeginsACharacter(bytes.substr(0, length)) && IsValidUtf8(bytes.substr(0, length));
    if (whole) {
      text.append(bytes.data(), length);
    } else {
      text += kReplacementCharacter;
    }
    bytes.remove_prefix(length);
  }
  return text;
}

std::string BytesOf(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  std::string bytes;
  for (const int32_t id : ids) bytes.append(tokenizer.Bytes(id).data(), tokenizer.Bytes(id).size());
  return bytes;
}

// The first half of `ids` is a prompt: what follows it continues its whole characters.
void CheckBehindAPrompt(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special,
                        absl::string_view decoded) {
  const absl::Span<const int32_t> prompt = absl::MakeConstSpan(ids).subspan(0, ids.size() / 2);
  Detokenizer of_prompt(tokenizer, skip_special), detokenizer(tokenizer, skip_special);
  std::string text;
  for (const int32_t id : prompt) of_prompt.Append(id, &text);
  detokenizer.Prime(prompt);
  for (size_t i = prompt.size(); i < ids.size(); ++i) detokenizer.Append(ids[i], &text);
  detokenizer.Flush(&text);
  CHECK(text == decoded) << "behind a prompt: " << text;
}

void CheckStream(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
  Detokenizer detokenizer(tokenizer, skip_special);
  std::string text, bytes;
  for (const int32_t id : ids) {
    const bool skipped = tokenizer.IsSpecial(id) && skip_special;
    const absl::string_view of_id = skipped ? absl::string_view() : tokenizer.Bytes(id);
    bytes.append(of_id.data(), of_id.size());
    const size_t before = text.size();
    detokenizer.Append(id, &text);
    CHECK(IsValidUtf8(absl::string_view(text).substr(before))) << "half a character is sent after id " << id;
    // Behind a byte that ends a character nothing is held back; looking at all of it each time would be quadratic.
    if (bytes.size() < 64 && !bytes.empty() && static_cast<uint8_t>(bytes.back()) < 0x80) {
      CHECK(text == Repaired(bytes)) << "held back after id " << id << ": " << text;
    }
  }
  detokenizer.Flush(&text);
  CHECK(text == Repaired(bytes)) << "streamed: " << text;
  CHECK(text == tokenizer.Decode(ids, skip_special)) << "streamed: " << text;
  CheckBehindAPrompt(tokenizer, ids, skip_special, text);
}

void CheckText(const Tokenizer& tokenizer, absl::string_view text) {
  const std::vector<int32_t> ids = tokenizer.Encode(text);
  CHECK(ids.size() <= text.size()) << ids.size() << " tokens of " << text.size() << " bytes";
  for (const int32_t id : ids) CHECK(id >= 0 && id < tokenizer.vocab_size() && !tokenizer.IsSpecial(id)) << id;
  CHECK(BytesOf(tokenizer, ids) == text) << "other bytes come back";
  CheckStream(tokenizer, ids, true);
  const std::string decoded = tokenizer.Decode(ids, true);
  CHECK(decoded == Repaired(text)) << decoded;
  if (decoded == text) CHECK(tokenizer.Encode(decoded) == ids) << "other ids the second time";
  const std::vector<int32_t> prompt = tokenizer.EncodePrompt(text);
  CHECK(prompt.size() == ids.size() + 1 && prompt[0] == 2) << prompt[0];
  const std::vector<int32_t> parsed = tokenizer.Encode(text, /*parse_special_tokens=*/true);
  CHECK(BytesOf(tokenizer, parsed) == text) << "other bytes come back of what was parsed";
  const auto is_special = [&](int32_t id) { return tokenizer.IsSpecial(id); };
  CHECK(std::any_of(parsed.begin(), parsed.end(), is_special) || parsed == ids) << "parsed, though none is special";
}

const Tokenizer& Loaded(const std::string& directory) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(directory);
  CHECK(tokenizer.ok()) << tokenizer.status();
  return *tokenizer->release();
}

void Run(absl::string_view bytes) {
  static const Tokenizer& of_books = Loaded(EMBEDDED_MODEL);
  static const Tokenizer& of_opt = Loaded(TESTDATA "/opt-tokenizer");
  FuzzInput input(bytes);
  const uint8_t kind = input.Byte();
  const Tokenizer& tokenizer = (kind & 1) != 0 ? of_opt : of_books;
  if ((kind & 2) == 0) return CheckText(tokenizer, input.Rest());
  std::vector<int32_t> ids;
  while (!input.empty()) {
    const auto number = static_cast<int32_t>(input.Number(2));
    // Most of them are tokens, some only nearly so.
    ids.push_back(number < 0xFF00 ? number % tokenizer.vocab_size() : (number & 0xFF) - 16 + tokenizer.vocab_size());
    if (number == 0xFFFF) ids.back() = -1;
  }
  CheckStream(tokenizer, ids, (kind & 4) != 0);
}

}  // namespace

FuzzTarget TokenizerTarget() {
  const std::string text =
      "It's 1984's 42nd  night,\n\n\tand \xE2\x80\x9Cwe'll\xE2\x80\x9D see "
      "\xF0\x9F\x8C\x8D\xC2\xA0\xE6\x97\xA5\xE6\x9C\xAC </s> <pad>";
  return {
      "tokenizer",
      1024,
      Run,
      {std::string(1, '\0') + text, "\1" + text, "\1" + std::string(200, 'a') + std::string(200, ' '),
       Raw("\0\xff\xc0\x80 \xed\xa0\x80 \xf4\x90\x80\x80 \xe2\x82"), "\2Once upon a time there was",
       Raw("\7\xff\xff\xff\x10\0\0\0\1\0\2\0\3\0\4")},
      {"'s", "'ll", " ", "\xC2\xA0", "\xE3\x80\x80", "\xE1\xA0\x8E", "\xE2\x80\x8B", "\xF0\x9F\x98\x80", "\xED\xA0\x80",
       "\xC0\x80", "\xF4\x8F\xBF\xBF", "\xE2\x82", "</s>", "aaaaaaaa", "        ", "\r\n", "\xCC\x81", "\xD9\xA3"}};
}

}  // namespace dejavu
