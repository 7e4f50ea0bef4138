#include "loadtest/generator/prompts.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

// OPT's special tokens are the first four; the rest is text.
constexpr uint32_t kFirstText = 4;

bool IsContinuation(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

}  // namespace

Prompts Prompts::Synthetic(uint32_t vocabulary, uint32_t bos) {
  Prompts prompts;
  prompts.vocabulary_ = vocabulary;
  prompts.bos_ = bos;
  return prompts;
}

absl::StatusOr<Prompts> Prompts::Corpus(std::string text, double bytes_per_token) {
  if (!IsValidUtf8(text)) return absl::InvalidArgumentError("the corpus is not UTF-8");
  if (text.find(' ') == std::string::npos) return absl::InvalidArgumentError("the corpus has no two words");
  Prompts prompts;
  prompts.text_ = std::move(text);
  prompts.bytes_per_token_ = bytes_per_token;
  return prompts;
}

void Prompts::Fill(int32_t tokens, std::mt19937_64* random, v1::GenerateRequest* request) const {
  if (text_.empty()) {
    std::uniform_int_distribution<uint32_t> draw(std::min(kFirstText, vocabulary_ - 1), vocabulary_ - 1);
    auto* ids = request->mutable_token_ids()->mutable_ids();
    ids->Reserve(tokens);
    ids->Add(bos_);
    while (ids->size() < tokens) ids->Add(draw(*random));
    return;
  }
  const size_t bytes = std::clamp<size_t>(static_cast<size_t>(tokens * bytes_per_token_), 1, text_.size());
  size_t begin = std::uniform_int_distribution<size_t>(0, text_.size() - bytes)(*random);
  // The next word, unless the slice would then reach beyond the end.
  const size_t space = text_.find(' ', begin);
  if (begin > 0 && space != std::string::npos && space + 1 + bytes <= text_.size()) begin = space + 1;
  size_t end = begin + bytes;
  while (begin > 0 && IsContinuation(text_[begin])) --begin;
  while (end < text_.size() && IsContinuation(text_[end])) ++end;
  request->set_text(text_.substr(begin, end - begin));
}

}  // namespace dejavu
