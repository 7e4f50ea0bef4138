// The model that a server serves, and what of it requests are held against. Constant from Server::SetReady on; any
// thread.
#ifndef SERVER_API_SERVED_MODEL_H_
#define SERVER_API_SERVED_MODEL_H_

#include <cstdint>
#include <string>

#include "engine/engine.h"
#include "engine/text/tokenizer.h"

namespace dejavu {

struct ServedModel {
  std::string name;
  int32_t vocab = 0;                     // rows of the embedding; ids are below it
  int32_t context = 0;                   // the most tokens of prompt and output together
  const Tokenizer* tokenizer = nullptr;  // null: token ids only
  Engine* engine = nullptr;
};

}  // namespace dejavu

#endif  // SERVER_API_SERVED_MODEL_H_
