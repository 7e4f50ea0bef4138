// What `dejavud --help` writes, made from the table of options. Any thread.
#ifndef CONFIG_HELP_TEXT_H_
#define CONFIG_HELP_TEXT_H_

#include <string>

namespace dejavu {

std::string HelpText();

}  // namespace dejavu

#endif  // CONFIG_HELP_TEXT_H_
