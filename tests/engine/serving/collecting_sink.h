// A TokenSink that keeps what it hears and lets a test wait for the end.
#ifndef TESTS_ENGINE_SERVING_COLLECTING_SINK_H_
#define TESTS_ENGINE_SERVING_COLLECTING_SINK_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "engine/request.h"
#include "kernels/base/mutex.h"

namespace dejavu {

class CollectingSink final : public TokenSink {
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
  void OnFinish(const Finish& finish) override {
    MutexLock lock(mutex_);
    finish_ = finish;
    changed_.NotifyAll();
  }

  Finish WaitForFinish() {
    MutexLock lock(mutex_);
    while (!finish_.has_value()) changed_.Wait(mutex_);
    return *finish_;
  }
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
  Mutex mutex_;
  CondVar changed_;
  std::vector<HeardToken> tokens_ ABSL_GUARDED_BY(mutex_);
  std::optional<Finish> finish_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // TESTS_ENGINE_SERVING_COLLECTING_SINK_H_
