// A directory of its own for a test that writes files; gone with the object.
#ifndef TESTS_SCRATCH_DIRECTORY_H_
#define TESTS_SCRATCH_DIRECTORY_H_

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace dejavu {

class ScratchDirectory {
 public:
  ScratchDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "dejavu_test.XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~ScratchDirectory() { std::filesystem::remove_all(path_); }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string Path(const std::string& name) const { return path_ + "/" + name; }

  // Returns the file's path. Removes what was there: ext4 waits for the disk when a file is truncated and written
  // again.
  std::string Write(const std::string& name, const std::string& bytes) const {
    std::filesystem::remove(Path(name));
    std::ofstream(Path(name), std::ios::binary) << bytes;
    return Path(name);
  }

 private:
  std::string path_;
};

}  // namespace dejavu

#endif  // TESTS_SCRATCH_DIRECTORY_H_
