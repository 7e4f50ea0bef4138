// Reads the tokenizer files of a checkpoint directory, which are not trusted, into plain data. Any thread.
#ifndef ENGINE_TEXT_TOKENIZER_FILES_H_
#define ENGINE_TEXT_TOKENIZER_FILES_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace dejavu {

struct TokenizerData {
  struct Token {
    std::string piece;  // as in the vocabulary; empty where no token has this id
    std::string bytes;  // what the piece stands for
    bool special = false;
  };
  struct Merge {
    int32_t left;
    int32_t right;
    int32_t result;  // never special
  };

  std::vector<Token> tokens;          // [largest id + 1]
  std::array<int32_t, 256> byte_ids;  // the token of each single byte, never special
  std::vector<Merge> merges;          // the first has the highest priority
  int32_t bos_id;
  int32_t eos_id;
};

// From vocab.json + merges.txt, else from tokenizer.json; special tokens also from tokenizer_config.json and
// special_tokens_map.json. NOT_FOUND when the directory holds neither form; INVALID_ARGUMENT with file and reason when
// a file is malformed, or asks for something other than OPT's byte-level BPE.
absl::StatusOr<TokenizerData> ReadTokenizerFiles(const std::string& directory);

}  // namespace dejavu

#endif  // ENGINE_TEXT_TOKENIZER_FILES_H_
