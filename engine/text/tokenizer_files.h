// Reads the tokenizer files of a checkpoint directory, which are not trusted, into plain data. Any thread.
#ifndef ENGINE_TEXT_TOKENIZER_FILES_H_
#define ENGINE_TEXT_TOKENIZER_FILES_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "engine/text/added_tokens.h"

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
    int32_t result;
  };

  std::vector<Token> tokens;          // [largest id + 1]
  std::array<int32_t, 256> byte_ids;  // the token of each single byte
  std::vector<Merge> merges;          // the first has the highest priority, of the same pair the last
  std::vector<AddedToken> added;
  std::vector<int32_t> before, behind;  // what stands around a prompt
  bool add_prefix_space = false;        // a stretch between added tokens that begins with no space gets one
  bool splits_words = true;
  std::vector<std::string> remarks;                 // a few, on what the files contradict themselves in
  absl::flat_hash_map<std::string, int32_t> words;  // by their bytes: words that become a token whatever the merges are
};

// From tokenizer.json, else from vocab.json and merges.txt, and from the settings beside them, as AutoTokenizer of
// Transformers 5. NOT_FOUND when the directory holds neither form; INVALID_ARGUMENT with file and reason when a file is
// malformed, or asks for something other than OPT's byte-level BPE.
absl::StatusOr<TokenizerData> ReadTokenizerFiles(const std::string& directory);

}  // namespace dejavu

#endif  // ENGINE_TEXT_TOKENIZER_FILES_H_
