// `dejavu-bench checkpoint`: a synthetic model on disk, for peers and for measuring how a model loads.
#ifndef TESTS_BENCH_CHECKPOINT_H_
#define TESTS_BENCH_CHECKPOINT_H_

#include <string>

namespace dejavu {

struct CheckpointOptions {
  std::string model;
  std::string weights = "stored";  // stored, fp32, fp16 or bf16
  std::string out;
};

// Exit code.
int RunCheckpoint(const CheckpointOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_CHECKPOINT_H_
