// From a selector in training to one in the file. Any thread.
#ifndef ENGINE_CALIBRATION_QUANTISE_H_
#define ENGINE_CALIBRATION_QUANTISE_H_

#include <vector>

#include "engine/calibration/selector_trainer.h"
#include "engine/model/predictor_data.h"
#include "engine/sparsity.h"

namespace dejavu {

// int8 stages and float16 thresholds. `shifts` (one per point) are added to the biases.
SelectorData Quantise(const FloatSelector& selector, const std::vector<double>& shifts, const std::vector<Tier>& tiers);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_QUANTISE_H_
