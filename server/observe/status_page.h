// The status page: one HTML document for browsers, and the JSON that it fetches every second. The document loads
// nothing else. Any thread.
#ifndef SERVER_OBSERVE_STATUS_PAGE_H_
#define SERVER_OBSERVE_STATUS_PAGE_H_

#include <string>

#include "server/api/serving_state.h"

namespace dejavu {

// server/observe/status_page.html
std::string StatusPage();

// An object with `version`, `state`, `model`, `uptime_seconds` and `default_tier`; once the model is loaded, with all
// the rest.
std::string StatusJson(const ServingState& state);

}  // namespace dejavu

#endif  // SERVER_OBSERVE_STATUS_PAGE_H_
