#include "module_under_test.h"

const DejavuCudaModule* dejavu::simt::ModuleUnderTest() { return EmulatedModule(); }
