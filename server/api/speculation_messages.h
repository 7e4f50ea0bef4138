// Speculation in the messages of the API. Pure functions; any thread.
#ifndef SERVER_API_SPECULATION_MESSAGES_H_
#define SERVER_API_SPECULATION_MESSAGES_H_

#include <optional>

#include "dejavu/v1/generation.pb.h"
#include "engine/engine.h"
#include "engine/speculation.h"
#include "server/options.h"

namespace dejavu {

// Nothing for UNSPECIFIED and for numbers that the API lacks.
std::optional<SpeculationMode> FromMessage(v1::SpeculationMode mode);

// Of requests that say nothing, as the loaded predictor allows; null: as the options have it.
SpeculationParams DefaultSpeculation(const ServerOptions& options, const Engine* engine);

void FillReport(const SpeculationReport& report, v1::SpeculationReport* message);

// `engine` is null while the model is loading.
void FillInfo(const ServerOptions& options, const Engine* engine, v1::SpeculationInfo* message);

}  // namespace dejavu

#endif  // SERVER_API_SPECULATION_MESSAGES_H_
