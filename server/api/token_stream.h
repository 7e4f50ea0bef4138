// TokenStream: hears one request's tokens from the engine and makes the replies of Generate and GenerateStream of them:
// text, stop strings, log-probabilities, the finish. What the client has not been sent yet is one pending chunk into
// which further tokens are merged; its size is bounded, but for the log-probabilities of the prompt, whose number was
// checked with the request.
#ifndef SERVER_API_TOKEN_STREAM_H_
#define SERVER_API_TOKEN_STREAM_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "dejavu/v1/generation.pb.h"
#include "engine/text/stop_matcher.h"
#include "engine/text/tokenizer.h"
#include "server/api/prompt_scores.h"
#include "server/api/reply_sink.h"

namespace dejavu {

struct TokenStreamOptions {
  v1::PromptInfo prompt;
  uint32_t sample = 0;                   // that all chunks name
  bool streaming = true;                 // false: one reply, at the end
  const Tokenizer* tokenizer = nullptr;  // null: no text
  std::vector<int32_t> prompt_tail;      // the last ids of the prompt, which the text continues
  std::vector<std::string> stop_strings;
  std::vector<int32_t> special_stops;  // [stop_strings]: the special token that it is, or -1
  bool include_stop_string = false;
  int32_t min_new_tokens = 0;    // no stop string ends before that many
  int64_t max_outbox_bytes = 0;  // of a streaming call
  SteadyTime arrival;
};

class TokenStream final : public ReplySink {
 public:
  // `wake` is called when NextReply has something: once the first time by the caller itself, then from the engine
  // thread.
  TokenStream(TokenStreamOptions options, std::function<void()> wake);

  bool OnToken(const Token& token) override;
  bool OnPromptToken(const Token& token) override;
  void OnFinish(const dejavu::Finish& finish) override;

  google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override;
  void ReleaseReply() override;

 private:
  void AppendText(int32_t id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void MatchStopToken(const dejavu::Finish& finish) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void MatchStops() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);  // token_text_ becomes text
  void FlushText() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FillFinish(const dejavu::Finish& finish) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const TokenStreamOptions options_;
  const std::function<void()> wake_;

  // A GenerateResponse is a GenerateChunk that holds everything: same fields, same numbers (server_test compares them).
  v1::GenerateChunk sent_;  // what NextReply gave out; touched by NextReply only
  v1::GenerateChunk pending_ ABSL_GUARDED_BY(mutex_);
  PromptScores scores_ ABSL_GUARDED_BY(mutex_);  // that belong to `pending_`
  bool has_pending_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t pending_bytes_ ABSL_GUARDED_BY(mutex_) = 0;  // about what `pending_` takes on the wire, without `scores_`
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  bool overflowed_ ABSL_GUARDED_BY(mutex_) = false;
  int matched_stop_ ABSL_GUARDED_BY(mutex_) = -1;  // index into stop_strings
  int32_t tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<Detokenizer> detokenizer_ ABSL_GUARDED_BY(mutex_);
  StopMatcher stop_matcher_ ABSL_GUARDED_BY(mutex_);
  std::string token_text_ ABSL_GUARDED_BY(mutex_);  // reused from token to token
};

}  // namespace dejavu

#endif  // SERVER_API_TOKEN_STREAM_H_
