// The status page: one HTML document for people with a browser, and the JSON that it asks for every second. It loads
// nothing but itself. Any thread.
#ifndef SERVER_OBSERVE_STATUS_PAGE_H_
#define SERVER_OBSERVE_STATUS_PAGE_H_

#include <string>

#include "server/api/serving_state.h"

namespace dejavu {

// server/observe/status_page.html
std::string StatusPage();

// An object: `version`, `state`, `model` and `uptime_seconds`, and once the model is loaded all the rest.
std::string StatusJson(const ServingState& state);

}  // namespace dejavu

#endif  // SERVER_OBSERVE_STATUS_PAGE_H_
