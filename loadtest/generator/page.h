// One HTML page of any number of result documents: all it needs is in it, and it loads nothing.
#ifndef LOADTEST_GENERATOR_PAGE_H_
#define LOADTEST_GENERATOR_PAGE_H_

#include <string>
#include <vector>

#include "loadtest/generator/document.h"

namespace dejavu {

// At least one run.
std::string HtmlPage(const std::vector<Json>& runs);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_PAGE_H_
