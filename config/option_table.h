// The one table of what can be configured: key, target, help and limits. File, environment, flags, `--help` and
// `--print-config` are all made from it.
#ifndef CONFIG_OPTION_TABLE_H_
#define CONFIG_OPTION_TABLE_H_

#include <vector>

#include "config/config.h"
#include "config/option.h"

namespace dejavu {

// Every option, bound to `config`, which must outlive it; in the order of --help, the keys of a section side by side.
std::vector<Option> OptionTable(Config* config);

}  // namespace dejavu

#endif  // CONFIG_OPTION_TABLE_H_
