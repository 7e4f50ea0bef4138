// The shapes that the ops of Backend ask for, the same for every device. What does not fit is our own mistake: CHECK.
// Nothing here reads what tensors hold, which may lie where the host cannot see it.
#ifndef KERNELS_CHECK_SHAPES_H_
#define KERNELS_CHECK_SHAPES_H_

#include <cstdint>

#include "kernels/backend.h"

namespace dejavu {

void CheckShape(const char* what, const Tensor& t, DType dtype, int64_t rows, int64_t cols);
void CheckMasks(const Selection& selection, int64_t rows, int64_t all);

// Of the op of the same name.
void CheckEmbed(const Tensor& y, const Tensor& ids, const EmbeddingWeights& table, const Tensor& drawn);
void CheckLayerNorm(const Tensor& y, const Tensor& x, const NormWeights& norm);
void CheckLinear(const Tensor& y, const Tensor& x, const LinearWeights& w);
void CheckLinear(const Tensor& y, const Tensor& x, const LinearWeights& w, int64_t group, const Ride& ride);
void CheckWriteKv(const KvLayer& kv, const Tensor& qkv, const RowTable& rows);
void CheckAttention(const Tensor& context, const Tensor& qkv, const KvLayer& kv, const RowTable& rows,
                    const Selection& heads);
void CheckSelect(const Selection& selection, const Tensor& counts, const Tensor& a, const SelectorWeights& w,
                 const Tensor& points);
void CheckMlp(const Tensor& y, const Tensor& x, const MlpWeights& w, const Selection& neurons, const Tensor& hidden,
              const Tensor& active);
void CheckAudit(const Tensor& result, const Tensor& x, const LinearWeights& up, const Tensor& worth,
                const Selection& neurons, const Tensor& hidden);
void CheckAdd(const Tensor& x, const Tensor& y);
void CheckDraw(const Tensor& tokens, const Tensor& bests, const Tensor& logits, const Tensor& draws,
               Candidates candidates, const DrawDetails& details);
void CheckGatherRows(const Tensor& y, const Tensor& x, const Tensor& ids);

}  // namespace dejavu

#endif  // KERNELS_CHECK_SHAPES_H_
