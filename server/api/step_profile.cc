#include "server/api/step_profile.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/chrome_trace.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

constexpr uint32_t kMaxProfiledSteps = 1000;
constexpr double kDefaultProfileS = 10.0, kMaxProfileS = 600.0;
constexpr std::chrono::milliseconds kLook(2);  // how often a profile looks for steps; the engine tells nobody
constexpr int64_t kTracedSteps = 512;          // that a dump holds: what a reply has room for

v1::StepPhase PhaseOf(const StepRecord& step) {
  if (step.prefill_rows == 0) return v1::STEP_PHASE_DECODE;
  return step.decode_rows == 0 ? v1::STEP_PHASE_PREFILL : v1::STEP_PHASE_MIXED;
}

void FillStep(const StepRecord& from, SteadyTime origin, v1::StepProfile* to) {
  to->set_step(static_cast<uint64_t>(from.step));
  to->set_start_seconds(Seconds(origin, from.start));
  to->set_total_ms(from.total_ms);
  to->set_plan_ms(from.plan_ms);
  to->set_shadow_ms(from.shadow_ms);
  to->set_forward_ms(from.forward_ms);
  to->set_handout_ms(from.handout_ms);
  to->set_phase(PhaseOf(from));
  to->set_decode_rows(static_cast<uint32_t>(from.decode_rows));
  to->set_prefill_rows(static_cast<uint32_t>(from.prefill_rows));
  to->set_shadow_rows(static_cast<uint32_t>(from.shadow_rows));
  to->set_weight_bytes(static_cast<uint64_t>(from.weight_bytes));
}

absl::Status CheckProfile(const v1::ProfileRequest& request) {
  if (request.steps() < 1 || request.steps() > kMaxProfiledSteps) {
    return InvalidField("steps", absl::StrCat("is ", request.steps(), "; it must be 1 to ", kMaxProfiledSteps));
  }
  if (!(request.timeout_s() >= 0.0 && request.timeout_s() <= kMaxProfileS)) {
    return InvalidField("timeout_s", absl::StrCat("is ", request.timeout_s(), "; it must be 0 to ", kMaxProfileS));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Profile(const ServingState& state, const v1::ProfileRequest& request, PauseFunction pause,
                     v1::ProfileResponse* response) {
  RETURN_IF_ERROR(CheckProfile(request));
  const StepTrace& trace = state.model().engine->trace();
  const double seconds = request.timeout_s() > 0.0 ? request.timeout_s() : kDefaultProfileS;
  const SteadyTime until = std::chrono::steady_clock::now() + Lasting(seconds);
  const int64_t from = trace.noted(), to = from + request.steps();
  while (trace.noted() < to && std::chrono::steady_clock::now() < until) {
    if (!pause(kLook) || state.phase() == Phase::kFailed) return ServerStopped();
  }
  const std::vector<StepRecord> steps = trace.StepsAfter(from);
  if (steps.empty()) {
    return UnavailableRetry(absl::StrCat("no step ended within ", seconds, " s: the engine has nothing to do"),
                            std::chrono::seconds(1));
  }
  const size_t count = std::min<size_t>(steps.size(), request.steps());
  for (size_t i = 0; i < count; ++i) FillStep(steps[i], steps[0].start, response->add_steps());
  return absl::OkStatus();
}

absl::Status DumpTrace(const ServingState& state, const v1::DumpTraceRequest& /*request*/,
                       v1::DumpTraceResponse* response) {
  const StepTrace& trace = state.model().engine->trace();
  const std::vector<StepRecord> steps = trace.StepsAfter(std::max<int64_t>(0, trace.noted() - kTracedSteps));
  const std::vector<SlowToken> tokens = trace.SlowestTokens();
  response->set_json(ChromeTrace(steps, tokens, state.started()));
  response->set_slow_tokens(static_cast<uint32_t>(tokens.size()));
  response->set_steps(static_cast<uint32_t>(steps.size()));
  return absl::OkStatus();
}

}  // namespace dejavu
