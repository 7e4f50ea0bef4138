// LoadProgress: how a load tells how far it is. Called by the thread that loads.
#ifndef ENGINE_LOAD_PROGRESS_H_
#define ENGINE_LOAD_PROGRESS_H_

#include <cstdint>
#include <functional>

namespace dejavu {

// Bytes of what is loaded, as stored, so far and in all. Returning false stops the load with CANCELLED.
using LoadProgress = std::function<bool(int64_t done_bytes, int64_t total_bytes)>;

}  // namespace dejavu

#endif  // ENGINE_LOAD_PROGRESS_H_
