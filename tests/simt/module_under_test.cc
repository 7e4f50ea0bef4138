#include "module_under_test.h"

namespace dejavu::simt {

const DejavuCudaModule* ModuleUnderTest() { return EmulatedModule(); }

bool HasDevices(int count) {
  GetEmulation().devices = count;
  return true;
}

}  // namespace dejavu::simt
