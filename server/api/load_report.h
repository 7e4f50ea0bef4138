// LoadReport: what the server tells clients that balance load of itself (ORCA), in the trailers of calls that the
// engine worked on, and by xds.service.orca.v3.OpenRcaService. Any thread.
#ifndef SERVER_API_LOAD_REPORT_H_
#define SERVER_API_LOAD_REPORT_H_

#include <string>

#include "server/api/health.h"
#include "server/api/serving_state.h"
#include "server/rpc/dispatcher.h"
#include "xds/data/orca/v3/orca_load_report.pb.h"

namespace dejavu {

// Where tokens are known, tenants hear shares and rates, and operators what runs and waits besides.
xds::data::orca::v3::OrcaLoadReport MakeLoadReport(ServingState& state, const std::string& tenant);

// The same as it stands in trailers; empty where the server gives none.
std::string LoadReportBytes(ServingState& state, const std::string& tenant);

// Before the server starts. `health` tells when it stops.
void RegisterLoadReports(ServingState* state, Health* health, Dispatcher* dispatcher);

}  // namespace dejavu

#endif  // SERVER_API_LOAD_REPORT_H_
