// The log: spdlog's default logger and the structured lines of LogEvent, as text or JSON. They go to standard error
// through a LogPipe, so that a slow reader holds nobody up (server/observe/log_pipe.h). StartLogging and StopLogging
// belong to main; any thread may call the rest.
#ifndef SERVER_OBSERVE_LOGGING_H_
#define SERVER_OBSERVE_LOGGING_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "server/observe/log_fields.h"
#include "spdlog/common.h"

namespace dejavu {

// Opens descriptors 0 to 2 where they are closed, ignores SIGPIPE, and makes spdlog's default logger write to `fd`.
// Once.
void StartLogging(const std::string& level, LogFormat format, int fd = 2);
// Writes what is queued, for a second at most. What is logged later is lost. Before every exit.
void StopLogging();

// Since the start; 0 without StartLogging.
int64_t LogLinesDropped();

LogFormat ActiveLogFormat();
// A line about an event, "request" or "engine". Nothing without StartLogging or below its level.
bool LogsEvents(spdlog::level::level_enum level);
// Whether a line about one more refused call shall be written: in a second at most `most_per_s` for each code (0: all).
// How many more there were is written at its end.
bool LogsRefusal(spdlog::level::level_enum level, absl::string_view code, int most_per_s);
void LogEvent(spdlog::level::level_enum level, absl::string_view event, const LogFields& fields);

}  // namespace dejavu

#endif  // SERVER_OBSERVE_LOGGING_H_
