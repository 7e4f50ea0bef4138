#include "server/api/generation_service.h"

#include <memory>
#include <string>

#include "server/api/abort.h"
#include "server/api/generate_call.h"
#include "server/api/model_info.h"
#include "server/api/native_dialect.h"
#include "server/api/score_call.h"
#include "server/api/server_info.h"
#include "server/api/service_names.h"
#include "server/api/tokenize.h"

namespace dejavu {

void RegisterGenerationService(ServingState* state, Dispatcher* dispatcher) {
  const std::string name = kGenerationService;
  const Needs always = {Caller::kTenant, Resource::kNone};
  const Needs model = {Caller::kTenant, Resource::kModel};
  const Needs capacity = {Caller::kTenant, Resource::kCapacity};

  dispatcher->Register(name, "Generate", capacity, [state] {
    return std::make_unique<GenerateCall>(state, std::make_unique<NativeDialect>(/*streaming=*/false));
  });
  dispatcher->Register(name, "GenerateStream", capacity, [state] {
    return std::make_unique<GenerateCall>(state, std::make_unique<NativeDialect>(/*streaming=*/true));
  });
  dispatcher->Register(name, "Score", capacity, [state] { return std::make_unique<ScoreCall>(state); });
  dispatcher->RegisterUnary(name, "Tokenize", model, state, Tokenize);
  dispatcher->RegisterUnary(name, "Detokenize", model, state, Detokenize);
  dispatcher->RegisterUnary(name, "GetModelInfo", model, state, GetModelInfo);
  dispatcher->RegisterUnary(name, "GetServerInfo", always, state, GetServerInfo);
  dispatcher->Register(name, "Abort", always, [state] { return std::make_unique<AbortCall>(state); });
}

}  // namespace dejavu
