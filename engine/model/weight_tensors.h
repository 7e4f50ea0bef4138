// TensorsOf: every tensor of an OptWeights by a name of its own, and which part of it a rank owns. In our layout that
// is a part of the rows. Plain data; any thread.
#ifndef ENGINE_MODEL_WEIGHT_TENSORS_H_
#define ENGINE_MODEL_WEIGHT_TENSORS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/shard.h"

namespace dejavu {

// A vector is one row of float32.
struct WeightTensor {
  std::string name;        // "layers.0.up.weight"
  Tensor* view = nullptr;  // of the OptWeights
  bool is_vector = false;
  int64_t rows = 0, cols = 0;  // of the whole model's
  Runs own;                    // rows, or elements of a vector
  Tensor* scale = nullptr;     // of a matrix that may be int8: [1, rows]
  std::string scale_name;

  int64_t own_rows() const { return is_vector ? 1 : CountOf(own); }
  int64_t own_cols() const { return is_vector ? CountOf(own) : cols; }
};

// In the order in which they lie in memory, a scale behind its matrix. `w` gets its layers and layouts, and must
// outlive what is returned.
std::vector<WeightTensor> TensorsOf(const OptConfig& config, const Shard& shard, bool has_own_head, OptWeights* w);

}  // namespace dejavu

#endif  // ENGINE_MODEL_WEIGHT_TENSORS_H_
