#include "kernels/cuda/module/context.h"

#include <cstdarg>
#include <cstdio>

namespace dejavu::cuda {
namespace {

thread_local char error_text[8192] = "";  // folders where a library is not are many

// Whether calls will go on failing, once the error that is only noted has been taken away.
bool IsBroken(const DejavuCudaContext& context) {
  cudaGetLastError();
  if (context.capturing) return false;  // the query would end the capture
  const cudaError_t error = cudaStreamQuery(context.stream);
  cudaGetLastError();
  return error != cudaSuccess && error != cudaErrorNotReady;
}

}  // namespace

const char* Error() { return error_text; }

int Fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof(error_text), format, arguments);
  va_end(arguments);
  return code;
}

int Conclude(DejavuCudaContext& context, int code) {
  if (IsBroken(context)) {
    context.failure = code;
    context.failure_text = std::string(error_text) + "; launched last: " + context.last_launch;
    Fail(code, "%s", context.failure_text.c_str());
  }
  return code;
}

int CudaFailure(DejavuCudaContext& context, cudaError_t error, const char* tried) {
  return Conclude(context, Fail(error, "%s: %s: %s", tried, cudaGetErrorName(error), cudaGetErrorString(error)));
}

int Check(DejavuCudaContext& context, cudaError_t error, const char* tried) {
  return error == cudaSuccess ? 0 : CudaFailure(context, error, tried);
}

int Enter(DejavuCudaContext& context, const char* tried) {
  if (context.failure != 0) return Fail(context.failure, "%s", context.failure_text.c_str());
  return Check(context, cudaSetDevice(context.device), tried);
}

}  // namespace dejavu::cuda
