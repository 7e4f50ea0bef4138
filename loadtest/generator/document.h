// Result documents: what the reports read them with. Times in ms; a number that is absent or null was not measured.
#ifndef LOADTEST_GENERATOR_DOCUMENT_H_
#define LOADTEST_GENERATOR_DOCUMENT_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace dejavu {

using Json = nlohmann::ordered_json;

// The documents in these files, in their order; a file holds one, or an array of them.
absl::StatusOr<std::vector<Json>> ReadResults(const std::vector<std::string>& paths);

// Of an object; nothing where there is no such number, or no object.
std::optional<double> Number(const Json& object, const std::string& key);
std::string Text(const Json& object, const std::string& key);

// Of the server, for people: "cpu, AVX3, 1 thread", and how its weights were made where they are synthetic.
std::string Backend(const Json& run);

// Three digits, or all of those before the point: "0.0123", "4.5", "1174".
std::string Short(double x);
std::string Short(std::optional<double> x);  // "-" for nothing
std::string Percent(std::optional<double> share);

// Mean share of the MLP's weights that a request read, of the sampled ones that reported it.
std::optional<double> MeanDensity(const Json& run);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_DOCUMENT_H_
