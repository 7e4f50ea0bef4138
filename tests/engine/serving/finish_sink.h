// FinishSink: a TokenSink that lets any thread wait for the end of its request. What becomes of the tokens is the
// business of the class derived from it, on the engine's thread.
#ifndef TESTS_ENGINE_SERVING_FINISH_SINK_H_
#define TESTS_ENGINE_SERVING_FINISH_SINK_H_

#include <optional>

#include "engine/request.h"
#include "kernels/base/mutex.h"

namespace dejavu {

class FinishSink : public TokenSink {
 public:
  bool OnPromptToken(const Token&) override { return true; }
  void OnFinish(const Finish& finish) final {
    MutexLock lock(mutex_);
    finish_ = finish;
    changed_.NotifyAll();
  }

  Finish WaitForFinish() {
    MutexLock lock(mutex_);
    while (!finish_.has_value()) changed_.Wait(mutex_);
    return *finish_;
  }

 protected:
  Mutex mutex_;
  CondVar changed_;  // the end has come, or what a derived class waits for
  std::optional<Finish> finish_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // TESTS_ENGINE_SERVING_FINISH_SINK_H_
