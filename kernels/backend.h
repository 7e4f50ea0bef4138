// Backend: one device, its memory and its in-order queue. The model is written once over these ops; a backend fuses and
// parallelises inside an op. Activations and residuals are float32 [rows, features]; weights keep their stored type and
// are widened as they are read; sums are float32. With int8 weights the activations are rounded to 14 bits and a sign,
// by row, and products are added as integers.
//
// Determinism: the value computed for a row depends on that row alone. Neither the other rows of the step, nor how a
// prompt was cut into chunks, nor the number of threads changes one bit of it: every sum has a fixed order. On a GPU
// this holds for ops of at most 32 rows; larger products are a library's, larger steps attend with weights of 11 bits.
//
// Threads: one thread at a time may call; ops are queued in order and Synchronize waits for them. Shape errors are our
// own mistakes and CHECK; only allocation can fail for reasons of the world.
#ifndef KERNELS_BACKEND_H_
#define KERNELS_BACKEND_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "kernels/communicator.h"
#include "kernels/draw.h"
#include "kernels/selection.h"
#include "kernels/tensor.h"

namespace dejavu {

// y = W x + b, in one of two layouts, so that whatever a Selection skips is contiguous memory.
struct LinearWeights {
  enum class Layout {
    kOutputRows,  // weight [outputs, inputs]: an output is a row; computed as dot products
    kInputRows,   // weight [inputs, outputs]: an input is a row; computed as a sum of rows, in ascending input order
  };
  Layout layout = Layout::kOutputRows;
  Tensor weight;  // float32, float16, bfloat16 or int8
  Tensor bias;    // float32 [1, outputs]; empty: none
  Tensor scale;   // float32 [1, rows of the weight], for int8: what the integers of a row are multiplied with

  int64_t inputs() const { return layout == Layout::kOutputRows ? weight.cols : weight.rows; }
  int64_t outputs() const { return layout == Layout::kOutputRows ? weight.rows : weight.cols; }
};

// The OPT MLP: y = down(relu(up(x))). A neuron is a row of both matrices.
struct MlpWeights {
  LinearWeights up;    // kOutputRows [neurons, hidden]
  LinearWeights down;  // kInputRows [neurons, hidden]
};

// More outputs of the same x, computed in the same pass over it.
struct Ride {
  Tensor y;                          // [rows, outputs]
  const LinearWeights* w = nullptr;  // kOutputRows; nullptr: nothing rides along
};

// Decides which outputs (neurons, heads) a row needs, from a few coordinates a of that row: row r selects output j iff
//   sum over k < rank of a[r][k] * b[k][j]  >  threshold[j]
// with rank and thresholds of the row's operating point. Outputs are padded to a multiple of kSelectorPadding by
// thresholds of +infinity.
inline constexpr int64_t kSelectorPadding = 64;
struct SelectorWeights {
  Tensor b;           // int8 [largest rank, padded outputs]; a's factors are folded into the thresholds or into a
  Tensor thresholds;  // float16 [operating points, padded outputs]; -infinity: always, +infinity: never
  Tensor ranks;       // int32 [1, operating points]: the first so many rows of b
  int64_t outputs = 0;
};
inline constexpr int32_t kSelectEverything = -1;  // in place of an operating point

// What Audit finds for a row, as columns of its result.
enum AuditField { kAuditSelected, kAuditActive, kAuditHits, kAuditMass, kAuditMissedMass, kAuditFields };

// Which ids logits belong to, and which of them may be chosen.
struct Candidates {
  int64_t first = 0;  // the id of the first logit of a row
  int64_t end = 0;    // ids from here on are not chosen
};

// What Draw has for rows that want more than the logits alone decide, or more than a token. Empty where none does. Only
// for rows that hold the logits of all ids.
struct DrawDetails {
  Tensor adjustments;  // int32 [any, kAdjustFields]
  Tensor scratch;      // float32 [1, adjustments]
  Tensor results;      // int32 [rows, kDetailFields]; of rows that ask
};

// A row for each token or position.
struct EmbeddingWeights {
  Tensor weight;  // [entries, features] float32, float16, bfloat16 or int8
  Tensor scale;   // float32 [1, entries], for int8: what the integers of a row are multiplied with
};

struct NormWeights {
  Tensor weight;  // float32 [1, features]
  Tensor bias;    // float32 [1, features]
  float epsilon = 1e-5f;
};

// One layer's paged keys and values: blocks of `block_tokens` positions, contiguous per head. A block's keys lie
// feature after feature, its values position after position.
struct KvLayer {
  void* keys = nullptr;    // [blocks][heads][head_dim][block_tokens]
  void* values = nullptr;  // [blocks][heads][block_tokens][head_dim]
  int32_t blocks = 0;
  int32_t heads = 0;
  int32_t block_tokens = 0;
  int32_t head_dim = 0;
  DType dtype = DType::kFloat32;  // or float16: what is beyond its range becomes its largest number
};

// Where the rows of a step stand, as flat arrays on the device. A row's sequence names a line of the block table;
// position p of that sequence lies in block block_table[sequence][p / block_tokens]. Rows of one sequence may follow
// each other in ascending position (a prefill chunk); a row sees the positions 0 ... its own.
struct RowTable {
  Tensor positions;    // int32 [1, rows]
  Tensor sequences;    // int32 [1, rows]
  Tensor block_table;  // int32 [sequences, blocks per sequence]
  Tensor saturated;  // int32 [1, rows], or empty: WriteKv adds how many numbers of a row were beyond the cache's range

  int64_t rows() const { return positions.cols; }
};

// Since the backend was made.
struct BackendStats {
  int64_t barriers = 0;    // times that all threads met
  int64_t barrier_ns = 0;  // time that the calling thread waited there for the others
};

class Backend {
 public:
  virtual ~Backend() = default;

  // For people: "cpu, AVX3, 2 threads (all processors)".
  virtual std::string Description() const = 0;
  virtual BackendStats stats() const = 0;

  // Memory of the device that nobody has taken, as far as can be known.
  virtual int64_t FreeBytes() const = 0;

  // Whether ops read tensors wherever they lie in this machine's memory, such as a mapped file.
  virtual bool ReadsHostMemory() const { return false; }

  // RESOURCE_EXHAUSTED with the size asked for when the device has not that much.
  virtual absl::StatusOr<Buffer> Allocate(int64_t bytes) = 0;

  // Copies between packed host memory (row after row, no gaps) and a view, which may be strided. Upload returns when
  // `source` may be reused; `target` of Download is filled when Synchronize has returned.
  virtual void Upload(Tensor target, const void* source) = 0;
  virtual void Download(void* target, Tensor source) = 0;
  virtual void Synchronize() = 0;

  // The group of `host` with an AllReduce for this backend's tensors; the rest is the host's. Takes all ranks.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> JoinGroup(std::unique_ptr<Communicator> host) { return host; }

  // Whether ops are only queued: the caller may prepare the next step while this one runs. Mark names the place in the
  // queue after all that was called so far, Await returns when that has been done: downloads before it are filled. The
  // last two marks can be awaited.
  virtual bool RunsAhead() const { return false; }
  virtual uint64_t Mark() { return 0; }
  virtual void Await(uint64_t /*mark*/) { Synchronize(); }

  // Runs `ops`, which calls ops below and neither copies nor allocates. With the same key but kOnce, ops are the same
  // with the same arguments, whatever lies in the memory: a device may keep what they launched and run it again without
  // calling them.
  static constexpr uint64_t kOnce = 0;
  virtual void Run(uint64_t /*key*/, absl::FunctionRef<void()> ops) { ops(); }

  // Time stamps in the queue, numbered 0 ... 63 by the caller. Not within Run. ElapsedMs waits for the second one.
  virtual void Stamp(int event) = 0;
  virtual double ElapsedMs(int from, int to) = 0;

  // y[r] = table[ids[r] + offset], widened, or y[r] += with `accumulate`. What lies outside the table is zero. ids
  // int32 [1, rows]. With `drawn` int32 [1, any], an id below zero names a place there (DrawnId), where the id is.
  virtual void Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate,
                     Tensor drawn = {}) = 0;

  // y = (x - mean) / sqrt(variance + epsilon) * weight + bias over the features of each row. y may be x.
  virtual void LayerNorm(Tensor y, Tensor x, const NormWeights& norm) = 0;

  // y = W x + b. `selected` names groups of `group` rows of the weight (heads: group = head_dim). For kInputRows the
  // sum leaves the other inputs out; for kOutputRows the other outputs are left untouched. Masks are ignored. With
  // `ride`, for kOutputRows only, its outputs are computed too. y must not overlap x.
  virtual void Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected = {}, int64_t group = 1,
                      const Ride& ride = {}) = 0;

  // Stores the K and V parts of qkv [rows, 3 * heads * head_dim] (Q of all heads, then K, then V) at each row's
  // position.
  virtual void WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) = 0;

  // context [rows, heads * head_dim] = softmax(scale * Q K^T) V per row and head, over positions 0 ... the row's own.
  // Context of heads that no row selected is left untouched; that of a head which another row selected is zero.
  virtual void Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                         const Selection& heads) = 0;

  // Fills `selection` (indices with room for every output, count, masks) for rows of `a` [rows, coordinates] and
  // `counts` int32 [1, rows] with how many outputs each row selected. `points` int32 [1, rows]: the operating point of
  // each row or kSelectEverything. Where a is NaN nothing is selected.
  virtual void Select(const Selection& selection, Tensor counts, Tensor a, const SelectorWeights& w, Tensor points) = 0;

  // y = down(relu(up(x))) over the selected neurons; a strict row leaves out what it did not select itself. With
  // `skip_zeros` the down-projection reads only neurons that are not zero in some row: the same result, bit by bit.
  // `active` int32 [1, n + 1], unless empty, receives how many neurons are not zero in each of the first n rows, and in
  // any row. `hidden` [rows, neurons] is scratch.
  virtual void Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, bool skip_zeros, Tensor hidden,
                   Tensor active) = 0;

  // Holds what each row selected against what the whole up-projection of its x gives. `worth` float32 [1, neurons]:
  // squared norms of the down rows; a neuron's mass is its activation squared times its worth. `result` float32 [rows,
  // kAuditFields]; `hidden` [rows, neurons] is scratch.
  virtual void Audit(Tensor result, Tensor x, const LinearWeights& up, Tensor worth, const Selection& neurons,
                     Tensor hidden) = 0;

  // tokens int32 [1, rows]: for each row of logits the most likely of the candidates, the lowest of equals, or by
  // `draws` [rows, kDrawFields] the one drawn from them (kernels/draw.h); kNotFinite where some logit of the row is not
  // finite, kNothingAllowed where the adjustments leave none. With no candidate among the ids the token means nothing.
  // `bests` [rows, kBestFields], unless empty. Logits are as they were at the end.
  virtual void Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates,
                    const DrawDetails& details = {}) = 0;

  // Reads all of `memory`, one row of bytes, as fast as the device can: to be timed by Stamp.
  virtual void ReadAll(Tensor memory) = 0;

  // x += y.
  virtual void Add(Tensor x, Tensor y) = 0;

  // y[r] = x[ids[r]] for float32 rows; ids int32 [1, y.rows].
  virtual void GatherRows(Tensor y, Tensor x, Tensor ids) = 0;
};

}  // namespace dejavu

#endif  // KERNELS_BACKEND_H_
