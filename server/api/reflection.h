// Reflection: grpc.reflection.v1 and v1alpha from the descriptors that are compiled in, for grpcurl and its like.
#ifndef SERVER_API_REFLECTION_H_
#define SERVER_API_REFLECTION_H_

#include "server/rpc/dispatcher.h"

namespace dejavu {

// Registers both versions. They list the services that `dispatcher` knows when asked.
void RegisterReflection(Dispatcher* dispatcher);

}  // namespace dejavu

#endif  // SERVER_API_REFLECTION_H_
