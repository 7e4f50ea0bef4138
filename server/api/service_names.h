// The full names of the services that the daemon has, as they stand on the wire.
#ifndef SERVER_API_SERVICE_NAMES_H_
#define SERVER_API_SERVICE_NAMES_H_

namespace dejavu {

inline constexpr char kGenerationService[] = "dejavu.v1.GenerationService";
inline constexpr char kAdminService[] = "dejavu.v1.AdminService";
inline constexpr char kKServeService[] = "inference.GRPCInferenceService";
inline constexpr char kVllmService[] = "vllm.grpc.engine.VllmEngine";
inline constexpr char kLoadReportService[] = "xds.service.orca.v3.OpenRcaService";
inline constexpr char kHealthService[] = "grpc.health.v1.Health";

}  // namespace dejavu

#endif  // SERVER_API_SERVICE_NAMES_H_
