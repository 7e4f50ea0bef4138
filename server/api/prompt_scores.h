// PromptScores: the log-probabilities of a prompt's tokens between the engine's thread, which leaves them here, and the
// thread that sends them. The message takes longer to make, and is made there. The owner's mutex guards it.
#ifndef SERVER_API_PROMPT_SCORES_H_
#define SERVER_API_PROMPT_SCORES_H_

#include <cstddef>
#include <vector>

#include "dejavu/v1/generation.pb.h"
#include "engine/request.h"

namespace dejavu {

class PromptScores {
 public:
  void Add(const Token& token);
  bool empty() const { return scored_.empty(); }
  void AppendTo(google::protobuf::RepeatedPtrField<v1::ScoredToken>* tokens) const;

 private:
  struct Scored {
    Token token;      // without `top`
    size_t top_ends;  // in top_
  };
  std::vector<Scored> scored_;
  std::vector<TokenLogprob> top_;
};

}  // namespace dejavu

#endif  // SERVER_API_PROMPT_SCORES_H_
