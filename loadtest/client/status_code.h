// What gRPC's codes are called on every page and in every report.
#ifndef LOADTEST_CLIENT_STATUS_CODE_H_
#define LOADTEST_CLIENT_STATUS_CODE_H_

#include "grpcpp/support/status.h"

namespace dejavu {

// "OK", "RESOURCE_EXHAUSTED"; "UNKNOWN" for what is no code.
const char* CodeName(grpc::StatusCode code);

}  // namespace dejavu

#endif  // LOADTEST_CLIENT_STATUS_CODE_H_
