// ConvertModel: a checkpoint as a directory whose weights need no second pass (engine/model/weights_file.h), for
// dejavu-convert. One thread.
#ifndef ENGINE_CONVERT_CONVERTER_H_
#define ENGINE_CONVERT_CONVERTER_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dejavu {

struct ConvertOptions {
  std::string model;               // a directory; its predictor.safetensors must fit, as for the daemon
  std::string weights = "stored";  // as ModelOptions has it
  std::string out;
  bool force = false;  // replace a model that was converted before
};

struct Converted {
  int64_t bytes = 0;    // of the weights
  std::string weights;  // their type
};

// What is being done, and how much of it. Returning false stops with CANCELLED.
using ConvertProgress = std::function<bool(absl::string_view part, int64_t done_bytes, int64_t total_bytes)>;

// Loads the weights as a daemon would, which takes their memory, and writes them with the model's other files into a
// directory beside `out`, which gets its name when all of it is on the disk. ALREADY_EXISTS where `out` is there, and
// with `force` where it is anything but a converted model.
absl::StatusOr<Converted> ConvertModel(const ConvertOptions& options, const ConvertProgress& progress);

}  // namespace dejavu

#endif  // ENGINE_CONVERT_CONVERTER_H_
