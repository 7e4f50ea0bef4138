// A tokenizer's files as a gateway fetches them: those of the model's directory that a tokenizer is made from, in a ZIP
// archive without compression. Any thread.
#ifndef SERVER_API_TOKENIZER_ARCHIVE_H_
#define SERVER_API_TOKENIZER_ARCHIVE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/base/mutex.h"

namespace dejavu {

struct TokenizerArchive {
  std::string bytes;
  std::string sha256;  // in hexadecimal digits
};

// One archive for all who ask, made for the first.
class TokenizerArchives {
 public:
  // FAILED_PRECONDITION where `directory`, always the same one, holds none.
  absl::StatusOr<std::shared_ptr<const TokenizerArchive>> Get(const std::string& directory);

 private:
  Mutex mutex_;
  std::shared_ptr<const TokenizerArchive> made_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_API_TOKENIZER_ARCHIVE_H_
