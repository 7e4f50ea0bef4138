#include "engine/stats.h"

namespace dejavu {

int64_t Account::refused_total() const {
  int64_t total = 0;
  for (int64_t count : refused) total += count;
  return total;
}

}  // namespace dejavu
