// What the tests of an engine on the device share: the engine, its requests, and what they must give.
#ifndef TESTS_SIMT_SERVED_MODEL_H_
#define TESTS_SIMT_SERVED_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "gtest/gtest.h"
#include "tests/engine/golden.h"

namespace dejavu {

inline constexpr int kTokens = 16;  // of a request

// Over the module under test, where the device is cuda; one device for each of the ranks.
EngineOptions ServedOptions(const std::string& checkpoint, const std::string& device,
                            const std::string& predictor = "none", int ranks = 1);
std::unique_ptr<Engine> MakeEngine(const EngineOptions& options);
std::unique_ptr<Engine> MakeEngine(const std::string& checkpoint, const std::string& device,
                                   const std::string& predictor = "none", int ranks = 1);

// For the checkpoint; returns `path`.
std::string WriteRandomPredictor(const std::string& checkpoint, const std::string& path);

Request Greedy(const std::vector<int32_t>& prompt, Tier tier, bool deterministic = false);

// Submitted together.
std::vector<std::vector<int32_t>> Generate(Engine& engine, const std::vector<Request>& requests);

// Up to a step whose two best logits lie so close that rounding may decide.
void ExpectGolden(const std::vector<int32_t>& ids, const Golden& golden);

std::string CheckpointTestName(const testing::TestParamInfo<std::string>& info);

}  // namespace dejavu

#endif  // TESTS_SIMT_SERVED_MODEL_H_
