// OpCases: each op of a backend in the settings that `dejavu-bench ops` measures, over weights and activations of its
// own. Every op runs over so many copies of its weights (or keys and values) that none of them stays in a cache. Lists
// of neurons are cut from a permutation, so that a sparse MLP too comes back to a row only after all others. One
// thread.
#ifndef TESTS_BENCH_OP_CASES_H_
#define TESTS_BENCH_OP_CASES_H_

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/layout.h"

namespace dejavu {

struct OpsOptions {
  int hidden = 4096;  // the layer of OPT-6.7b
  int ffn = 16384;
  std::string weights = "bf16";  // fp32, fp16, bf16 or int8
  int batch = 1;
  int repeats = 7;
  int threads = 0;
  int working_set_mib = 512;  // what an op goes through before it reads the same bytes again
  std::string json;
};

// One op in one setting: what it is called, what it moves, and a call of it.
struct OpCase {
  std::string op;
  int batch = 1;
  double density = 1.0;
  int context = 0;
  double bytes = 0.0;                // weights, or keys and values, that a call reads
  double operations = 0.0;           // a multiply-add is two
  std::function<void(int64_t)> run;  // the i-th call

  std::vector<double> seconds{}, bandwidth_shares{}, peak_shares{}, proportional_costs{};  // by repeat
};

class OpCases {
 public:
  static constexpr char kGathered[] = "gathered mlp";

  OpCases(const OpsOptions& options, Backend& dev) : options_(options), dev_(dev) {}

  // Fills the memory that the cases use.
  absl::Status Allocate();
  // In the order of the table; the dense MLP, to which the gathered ones are held, comes first.
  std::vector<OpCase> All();

 private:
  int64_t working_set_bytes() const { return static_cast<int64_t>(options_.working_set_mib) << 20; }
  int64_t rows() const;    // the widest batch
  int64_t padded() const;  // outputs of a selector, as stored
  void ReserveLayers(DeviceLayout& layout);
  void ReserveLists(DeviceLayout& layout);
  void ReserveSelectors(DeviceLayout& layout);
  void ReserveKv(DeviceLayout& layout);
  void FillLayers();
  void FillSelectors();
  void FillActivations();
  void FillKv();
  void FillLists();
  void FillSequences();
  OpCase LinearCase(LinearWeights::Layout layout, int batch);
  OpCase MlpCase(int batch);
  OpCase GatheredCase(size_t density);
  OpCase SelectCase();
  OpCase AttentionCase(int context);
  OpCase NormCase();
  Selection List(size_t density, int64_t i) const;

  const OpsOptions& options_;
  Backend& dev_;
  Buffer storage_;
  std::mt19937 random_{1};

  std::vector<MlpWeights> layers_;
  Tensor up_bias_, down_bias_, scale_;
  Tensor x_, wide_x_;        // [rows, hidden], [rows, ffn]
  Tensor y_, wide_y_;        // likewise
  Tensor scratch_, active_;  // of Mlp
  NormWeights norm_;

  std::vector<Tensor> lists_;   // by density: int32 [lists, neurons of a list]
  std::vector<Tensor> counts_;  // by density: int32 [1, 1]

  std::vector<SelectorWeights> selectors_;
  Tensor coordinates_, points_, selected_, masks_, indices_, count_;

  KvLayer kv_;
  Tensor keys_, values_, qkv_, positions_, sequences_, block_table_;
};

}  // namespace dejavu

#endif  // TESTS_BENCH_OP_CASES_H_
