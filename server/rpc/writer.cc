#include "server/rpc/writer.h"

#include <utility>

namespace dejavu {

Writer::Writer() : thread_([this] { Run(); }) {}

Writer::~Writer() {
  stop_.store(true);
  signal_.fetch_add(1);
  signal_.notify_one();
  thread_.join();
}

void Writer::Post(std::shared_ptr<WriterTask> task) {
  WriterTask* const node = task.get();
  node->self_ = std::move(task);
  // The writer may take the node as soon as it is on the stack: nothing of it is read after the exchange.
  WriterTask* below = newest_.load(std::memory_order_relaxed);
  do {
    node->next_ = below;
  } while (!newest_.compare_exchange_weak(below, node, std::memory_order_release, std::memory_order_relaxed));
  if (below != nullptr) return;  // the thread that pushed the first one has woken the writer
  signal_.fetch_add(1, std::memory_order_release);
  signal_.notify_one();
}

void Writer::Run() {
  while (true) {
    const uint32_t seen = signal_.load(std::memory_order_acquire);
    WriterTask* stack = newest_.exchange(nullptr, std::memory_order_acquire);
    if (stack == nullptr) {
      if (stop_.load()) return;
      signal_.wait(seen, std::memory_order_acquire);
      continue;
    }
    WriterTask* queue = nullptr;  // oldest first
    while (stack != nullptr) {
      WriterTask* const next = stack->next_;
      stack->next_ = queue;
      queue = stack;
      stack = next;
    }
    while (queue != nullptr) {
      WriterTask* const next = queue->next_;
      const std::shared_ptr<WriterTask> task = std::move(queue->self_);
      task->RunInWriter();  // may post itself again
      queue = next;
    }
  }
}

}  // namespace dejavu
