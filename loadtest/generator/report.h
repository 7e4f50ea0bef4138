// What a run measured, as text: for a terminal, and as a table of a README.
#ifndef LOADTEST_GENERATOR_REPORT_H_
#define LOADTEST_GENERATOR_REPORT_H_

#include <string>
#include <vector>

#include "loadtest/generator/document.h"

namespace dejavu {

std::string ConsoleReport(const Json& run);

// A Markdown table with a row for each series of open-loop runs: what it did at its knee.
std::string MarkdownReport(const std::vector<Json>& runs);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_REPORT_H_
