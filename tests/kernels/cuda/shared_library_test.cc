// Where cuBLAS and NCCL are looked for, by libraries that every machine has.
#include "kernels/cuda/module/shared_library.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "tests/scratch_directory.h"

namespace dejavu::cuda {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

constexpr const char* kVariable = "DEJAVU_CUDA_LIBRARIES";
constexpr const char* kName = "libdejavu_made_up.so.1";

class SharedLibraryTest : public testing::Test {
 protected:
  ~SharedLibraryTest() override { unsetenv(kVariable); }

  // Puts the library with that function there.
  static void PutLibrary(const std::string& path, const void* function) {
    Dl_info info;
    ASSERT_NE(dladdr(function, &info), 0);
    std::filesystem::create_symlink(std::filesystem::canonical(info.dli_fname), path);
  }
  static const void* Cosine() {
    double (*const cosine)(double) = std::cos;
    return reinterpret_cast<const void*>(cosine);
  }

  const ScratchDirectory first_, second_;
};

TEST_F(SharedLibraryTest, IsFoundInTheFoldersOfTheVariable) {
  PutLibrary(second_.Path(kName), Cosine());
  setenv(kVariable, (first_.path() + "::" + second_.path()).c_str(), 1);
  SharedLibrary library;
  library.Load({"libdejavu_made_up.so.2", kName});
  EXPECT_EQ(library.missing(), "");
  double (*cosine)(double) = nullptr;
  library.Resolve("cos", &cosine);
  ASSERT_NE(cosine, nullptr);
  EXPECT_EQ(cosine(0), 1);
  library.Resolve("cosine_of_nothing", &cosine);
  EXPECT_THAT(library.missing(), HasSubstr("cosine_of_nothing"));
}

TEST_F(SharedLibraryTest, TheFoldersComeFirst) {
  setenv(kVariable, first_.path().c_str(), 1);
  void* demangle = nullptr;  // of the C++ library, which takes the other one's name
  for (const bool there : {false, true}) {
    if (there) PutLibrary(first_.Path("libm.so.6"), reinterpret_cast<const void*>(abi::__cxa_demangle));
    SharedLibrary library;
    library.Load({"libm.so.6"});
    EXPECT_EQ(library.missing(), "");
    library.Resolve("__cxa_demangle", &demangle);
    EXPECT_EQ(demangle != nullptr, there);
  }
}

TEST_F(SharedLibraryTest, TheErrorNamesEveryPlaceWithTheReason) {
  const std::string file = second_.Write(kName, "no library");
  setenv(kVariable, (first_.path() + ":" + second_.path()).c_str(), 1);
  SharedLibrary library;
  library.Load({kName, "libdejavu_made_up.so"});
  EXPECT_THAT(
      library.missing(),
      AllOf(HasSubstr(first_.Path(kName) + ": cannot open"), HasSubstr(file + ": file too short"),
            HasSubstr(second_.Path("libdejavu_made_up.so") + ": cannot open"),
            HasSubstr("; libdejavu_made_up.so.1: cannot open"), HasSubstr("DEJAVU_CUDA_LIBRARIES was searched")));
  unsetenv(kVariable);
  SharedLibrary without;
  without.Load({kName});
  EXPECT_THAT(without.missing(), AllOf(HasSubstr("DEJAVU_CUDA_LIBRARIES can name folders"), Not(HasSubstr(file))));
}

}  // namespace
}  // namespace dejavu::cuda
