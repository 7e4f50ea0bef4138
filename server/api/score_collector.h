// ScoreCollector: hears the log-probabilities of one prompt from the engine and makes the reply of Score of them.
#ifndef SERVER_API_SCORE_COLLECTOR_H_
#define SERVER_API_SCORE_COLLECTOR_H_

#include <functional>
#include <optional>

#include "server/api/prompt_scores.h"
#include "server/api/reply_sink.h"

namespace dejavu {

class ScoreCollector final : public ReplySink {
 public:
  // `response` holds request_id and model.
  ScoreCollector(v1::ScoreResponse response, SteadyTime arrival, std::function<void()> wake);

  bool OnToken(const Token& token) override;
  bool OnPromptToken(const Token& token) override;
  void OnFinish(const dejavu::Finish& finish) override;

  google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override;
  void ReleaseReply() override;

  // What NextReply has given, as one of several.
  void MoveTo(v1::PromptScore* score);

 private:
  const SteadyTime arrival_;
  const std::function<void()> wake_;
  v1::ScoreResponse response_ ABSL_GUARDED_BY(mutex_);
  PromptScores scores_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_API_SCORE_COLLECTOR_H_
