// What Linux reports of this process.
#ifndef SERVER_OBSERVE_PROCESS_FACTS_H_
#define SERVER_OBSERVE_PROCESS_FACTS_H_

#include <cstdint>

namespace dejavu {

struct ProcessFacts {
  double cpu_seconds = 0.0;  // user and system
  int64_t resident_bytes = 0;
  int64_t open_files = 0;
  double start_unix_seconds = 0.0;
};

// Any thread.
ProcessFacts ReadProcessFacts();

}  // namespace dejavu

#endif  // SERVER_OBSERVE_PROCESS_FACTS_H_
