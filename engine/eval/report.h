// What an evaluation looks like to people (a table) and to scripts (JSON). Any thread.
#ifndef ENGINE_EVAL_REPORT_H_
#define ENGINE_EVAL_REPORT_H_

#include <string>

#include "engine/eval/evaluation.h"

namespace dejavu {

// {"weight_dtype": ..., "tokens": ..., "tiers": [...]}; null where there is nothing to compute a figure from.
std::string EvaluationJson(const Evaluation& evaluation);

// A line of column heads and one for each tier.
std::string EvaluationTable(const Evaluation& evaluation);

}  // namespace dejavu

#endif  // ENGINE_EVAL_REPORT_H_
