// What is asked: made-up token ids, or slices of a text. Immutable; any thread.
#ifndef LOADTEST_GENERATOR_PROMPTS_H_
#define LOADTEST_GENERATOR_PROMPTS_H_

#include <cstdint>
#include <random>
#include <string>

#include "absl/status/statusor.h"
#include "dejavu/v1/generation.pb.h"

namespace dejavu {

class Prompts {
 public:
  // Random ids below `vocabulary`, the first one `bos`.
  static Prompts Synthetic(uint32_t vocabulary, uint32_t bos);
  // Slices that begin at a word, of about so many tokens at `bytes_per_token`. INVALID_ARGUMENT where the text is not
  // UTF-8 or has no words.
  static absl::StatusOr<Prompts> Corpus(std::string text, double bytes_per_token);

  // Sets the prompt. Of synthetic ones the length is exact; two requests have no beginning in common but by chance.
  void Fill(int32_t tokens, std::mt19937_64* random, v1::GenerateRequest* request) const;

 private:
  Prompts() = default;

  uint32_t vocabulary_ = 0, bos_ = 0;
  std::string text_;  // empty: synthetic
  double bytes_per_token_ = 0.0;
};

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_PROMPTS_H_
