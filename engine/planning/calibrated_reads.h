// What a decode step reads of the layers of a calibrated model, from what its predictor's file counted. Any thread.
#ifndef ENGINE_PLANNING_CALIBRATED_READS_H_
#define ENGINE_PLANNING_CALIBRATED_READS_H_

#include <vector>

#include "engine/load/synthetic/densities.h"
#include "engine/model/predictor_data.h"

namespace dejavu {

// The file says how often each neuron was active, and how many a tier selected, on the calibration's text. It does not
// say how often a tier selects each neuron: that is taken to be proportional to how often the neuron is active.
ReadTable CalibratedReads(const PredictorData& predictor, const std::vector<int>& batches);

}  // namespace dejavu

#endif  // ENGINE_PLANNING_CALIBRATED_READS_H_
