// ModelShape: the sizes and special tokens of a served model, all that callers need to know of it. Plain data.
#ifndef ENGINE_MODEL_SHAPE_H_
#define ENGINE_MODEL_SHAPE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace dejavu {

// The one family of models that the engine runs, as clients see it.
inline constexpr char kModelFamily[] = "opt";

inline constexpr size_t kMostEndTokens = 64;

struct ModelShape {
  int32_t hidden = 0;
  int32_t layers = 0;
  int32_t heads = 0;
  int32_t head_dim = 0;  // hidden / heads
  int32_t ffn = 0;       // neurons of a layer's MLP
  int32_t vocab = 0;
  int32_t context = 0;                    // positions of a sequence, prompt and output
  std::optional<int32_t> bos_token = 2;   // nothing: the model names none, as in the next one
  std::vector<int32_t> eos_tokens = {2};  // each of them ends a text; kMostEndTokens at most
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_SHAPE_H_
