// Processor time of this process and its threads. Any thread.
#ifndef TESTS_BENCH_PROCESSOR_TIME_H_
#define TESTS_BENCH_PROCESSOR_TIME_H_

#include <time.h>

#include <vector>

namespace dejavu {

double ProcessorMs(clockid_t clock);

// What this process takes beside the threads that were there when this was made: the caller counts, the others do not.
// Those must live as long as this.
class ProcessorTimeBeside {
 public:
  ProcessorTimeBeside();
  double Ms() const;

 private:
  std::vector<clockid_t> others_;
};

}  // namespace dejavu

#endif  // TESTS_BENCH_PROCESSOR_TIME_H_
