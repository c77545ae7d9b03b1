// What the launchers give back on a machine without a GPU, "list/entry: number name" once for each different answer.
#include <set>
#include <string>

#include "every_launch.h"

// Of the CUDA runtime, whose header this program needs no more of.
extern "C" int cudaGetDeviceCount(int* count);

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == 0 && count > 0) {
    std::cerr << "this machine has a GPU: kernels would run on pointers that are made up\n";
    return 2;
  }
  std::set<std::string> answers;
  const auto visit = [&](const char* list, const char* entry, int error) {
    const std::string name = pyconv::cuda::error_name(error);
    answers.insert(std::string(list) + "/" + entry + ": " + std::to_string(error) + " " + name);
  };
  pyconv::tests::EveryLaunch(pyconv::cuda::kernel_table(), visit).run(pyconv::tests::read_geometries());
  for (const std::string& answer : answers) std::cout << answer << "\n";
  return 0;
}
