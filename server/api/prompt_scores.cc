#include "server/api/prompt_scores.h"

#include "server/api/reply_sink.h"

namespace dejavu {

void PromptScores::Add(const Token& token) {
  top_.insert(top_.end(), token.top.begin(), token.top.end());
  scored_.push_back({token, top_.size()});
  scored_.back().token.top = {};
}

void PromptScores::AppendTo(google::protobuf::RepeatedPtrField<v1::ScoredToken>* tokens) const {
  size_t begin = 0;
  for (const Scored& scored : scored_) {
    Token token = scored.token;
    token.top = absl::MakeConstSpan(top_).subspan(begin, scored.top_ends - begin);
    begin = scored.top_ends;
    v1::ScoredToken* message = tokens->Add();
    message->set_id(static_cast<uint32_t>(token.id));
    FillLogprobs(token, message);
  }
}

}  // namespace dejavu
