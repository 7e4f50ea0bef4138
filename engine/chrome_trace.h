// A StepTrace's content as JSON for chrome://tracing and ui.perfetto.dev. Any thread.
#ifndef ENGINE_CHROME_TRACE_H_
#define ENGINE_CHROME_TRACE_H_

#include <string>
#include <vector>

#include "engine/step_trace.h"

namespace dejavu {

// Times count from `origin`.
std::string ChromeTrace(const std::vector<StepRecord>& steps, const std::vector<SlowToken>& tokens, SteadyTime origin);

}  // namespace dejavu

#endif  // ENGINE_CHROME_TRACE_H_
