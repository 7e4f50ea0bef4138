// A decode step allocates nothing: every `new` of the engine thread is counted while sixteen sequences decode.
#include <atomic>
#include <cstdlib>
#include <latch>
#include <new>

#include "engine/engine.h"
#include "gtest/gtest.h"
#include "tests/engine/serving/finish_sink.h"

namespace {
thread_local bool counting = false;
std::atomic<int64_t> allocations = 0;

void* Allocate(size_t bytes) {
  if (counting) allocations.fetch_add(1, std::memory_order_relaxed);
  void* const p = std::malloc(bytes == 0 ? 1 : bytes);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
}  // namespace

void* operator new(size_t bytes) { return Allocate(bytes); }
void* operator new[](size_t bytes) { return Allocate(bytes); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }

namespace dejavu {
namespace {

// The first stream's sink switches counting on for the engine thread, and off before any stream ends.
class CountingSink final : public FinishSink {
 public:
  CountingSink(bool counts, int from, int to) : counts_(counts), from_(from), to_(to) {}

  std::latch others_are_there{1};

  bool OnToken(const Token&) override {
    ++tokens_;
    if (counts_ && tokens_ == 1) others_are_there.wait();
    if (counts_ && tokens_ == from_) counting = true;
    if (counts_ && tokens_ == to_) counting = false;
    return true;
  }

 private:
  const bool counts_;
  const int from_, to_;
  int tokens_ = 0;
};

TEST(DecodeStep, AllocatesNothing) {
  EngineOptions options;
  options.model = EMBEDDED_MODEL;
  options.predictor = "none";
  const auto engine = Engine::Create(options, 0, nullptr);
  ASSERT_TRUE(engine.ok()) << engine.status();
  constexpr int kRounds = 3, kTokens = 480, kFrom = 60, kTo = 440;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<std::shared_ptr<CountingSink>> sinks;
    for (int i = 0; i < 16; ++i) {
      Request request;
      request.prompt = {2, 10 + i, 20, 30};
      request.max_new_tokens = kTokens;
      request.ignore_eos = true;
      request.sparsity.tier = i % 2 == 0 ? Tier::kExact : Tier::kDense;
      sinks.push_back(std::make_shared<CountingSink>(i == 0, kFrom, kTo));
      ASSERT_TRUE((*engine)->Submit(std::move(request), sinks.back()).ok());
    }
    sinks[0]->others_are_there.count_down();
    for (const auto& sink : sinks) sink->WaitForFinish();
  }
  EXPECT_EQ(allocations.load(), 0) << "in " << kRounds * (kTo - kFrom) << " steps";
}

}  // namespace
}  // namespace dejavu
