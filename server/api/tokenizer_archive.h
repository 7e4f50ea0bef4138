// A tokenizer's files as a gateway fetches them: those of the model's directory that a tokenizer is made from, in a ZIP
// archive without compression. Any thread.
#ifndef SERVER_API_TOKENIZER_ARCHIVE_H_
#define SERVER_API_TOKENIZER_ARCHIVE_H_

#include <string>

#include "absl/status/statusor.h"

namespace dejavu {

// FAILED_PRECONDITION where `directory` holds none.
absl::StatusOr<std::string> MakeTokenizerArchive(const std::string& directory);

}  // namespace dejavu

#endif  // SERVER_API_TOKENIZER_ARCHIVE_H_
