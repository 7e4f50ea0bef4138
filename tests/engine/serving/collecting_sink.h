// CollectingSink: a FinishSink that keeps what it hears.
#ifndef TESTS_ENGINE_SERVING_COLLECTING_SINK_H_
#define TESTS_ENGINE_SERVING_COLLECTING_SINK_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "tests/engine/serving/finish_sink.h"

namespace dejavu {

class CollectingSink final : public FinishSink {
 public:
  struct HeardToken {
    int32_t id;
    bool has_logprob;
    float logprob;
    int32_t rank;
    std::vector<TokenLogprob> top;
    bool stop;
  };

  // `keep_going` is asked after each token with the number of tokens so far; engine thread.
  explicit CollectingSink(std::function<bool(size_t)> keep_going = nullptr) : keep_going_(std::move(keep_going)) {}

  bool OnToken(const Token& token) override { return Keep(token); }
  bool OnPromptToken(const Token& token) override { return Keep(token); }

  // Or for the end.
  void WaitForTokens(size_t count) {
    MutexLock lock(mutex_);
    while (!finish_.has_value() && tokens_.size() < count) changed_.Wait(mutex_);
  }
  std::vector<HeardToken> tokens() {
    MutexLock lock(mutex_);
    return tokens_;
  }
  std::vector<int32_t> ids() {
    std::vector<int32_t> ids;
    for (const HeardToken& token : tokens()) ids.push_back(token.id);
    return ids;
  }

 private:
  bool Keep(const Token& t) {
    size_t count;
    {
      MutexLock lock(mutex_);
      tokens_.push_back(
          {t.id, t.has_logprob, t.logprob, t.rank, std::vector<TokenLogprob>(t.top.begin(), t.top.end()), t.stop});
      count = tokens_.size();
      changed_.NotifyAll();
    }
    return keep_going_ == nullptr || keep_going_(count);
  }

  const std::function<bool(size_t)> keep_going_;
  std::vector<HeardToken> tokens_ ABSL_GUARDED_BY(mutex_);
};

// For its `keep_going`: every step takes some ms, so that a stream of hundreds of tokens lasts for seconds.
inline bool TakesItsTime(size_t) {
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  return true;
}

}  // namespace dejavu

#endif  // TESTS_ENGINE_SERVING_COLLECTING_SINK_H_
