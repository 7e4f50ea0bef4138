// Turns any bytes into text that is safe in one line of a log: it neither ends the line, nor commands a terminal, nor
// is ill-formed. Any thread.
#ifndef SERVER_OBSERVE_LOG_TEXT_H_
#define SERVER_OBSERVE_LOG_TEXT_H_

#include <string>

#include "absl/strings/string_view.h"

namespace dejavu {

// For a line of plain text. Control characters, characters that reorder or end lines, and ill-formed UTF-8 become \n or
// \xNN. With `quoted`, backslashes and quotation marks are escaped too.
std::string EscapedForText(absl::string_view text, bool quoted);
// As a JSON string, with its quotation marks; ill-formed UTF-8 becomes U+FFFD.
std::string JsonString(absl::string_view text);

}  // namespace dejavu

#endif  // SERVER_OBSERVE_LOG_TEXT_H_
