// Writer: the thread that issues writes for those who must not. StartWrite does the sendmsg in the caller (43 us
// measured), so the engine thread only leaves the RPC here: one push on a lock-free stack, and a futex wake if the
// writer sleeps.
#ifndef SERVER_RPC_WRITER_H_
#define SERVER_RPC_WRITER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace dejavu {

// Something that the writer thread runs. In the queue at most once at a time.
class WriterTask {
 public:
  virtual ~WriterTask() = default;
  virtual void RunInWriter() = 0;

 private:
  friend class Writer;
  std::shared_ptr<WriterTask> self_;  // set while queued
  WriterTask* next_ = nullptr;
};

class Writer {
 public:
  Writer();
  // What is queued is still run.
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  // Any thread; neither locks nor allocates.
  void Post(std::shared_ptr<WriterTask> task);

 private:
  void Run();

  std::atomic<WriterTask*> newest_{nullptr};
  std::atomic<uint32_t> signal_{0};  // changes when there is something to look at
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace dejavu

#endif  // SERVER_RPC_WRITER_H_
