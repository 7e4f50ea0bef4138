// EngineLog: logs a line about the engine every few seconds while the engine works, from a thread of its own. Construct
// and destroy it in one thread; the engine must outlive it.
#ifndef SERVER_OBSERVE_ENGINE_LOG_H_
#define SERVER_OBSERVE_ENGINE_LOG_H_

#include <chrono>
#include <thread>

#include "engine/engine.h"
#include "kernels/base/mutex.h"

namespace dejavu {

class EngineLog {
 public:
  EngineLog(const Engine* engine, std::chrono::duration<double> every);
  ~EngineLog();

 private:
  struct Snapshot {
    SteadyTime at;
    EngineStats stats;
    int64_t predicted_rows = 0, predicted_neurons = 0;  // decode rows by layers; neurons that they read, up and down
  };

  Snapshot Take() const;
  void Run();
  void Write(const Snapshot& before, const Snapshot& now) const;

  const Engine* const engine_;
  const std::chrono::duration<double> every_;
  Mutex mutex_;
  CondVar stop_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_ENGINE_LOG_H_
