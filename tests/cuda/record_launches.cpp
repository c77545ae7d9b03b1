// How every kernel is launched, recorded by the emulation, in which no kernel runs: "symbol threads shared-bytes", the
// largest of each. Fails where a launcher gives back an error.
#include "emulation/launches.h"

#include "every_launch.h"

int main() {
  pyconv_emulation_record_only(true);
  int failures = 0;
  const auto visit = [&](const char* list, const char* entry, int error) {
    if (error == 0) return;
    std::cerr << list << "/" << entry << ": " << pyconv::cuda::error_name(error) << "\n";
    ++failures;
  };
  pyconv::tests::EveryLaunch(pyconv::cuda::kernel_table(), visit).run(pyconv::tests::read_geometries());
  std::vector<PyconvEmulationLaunches> records(pyconv_emulation_launches(nullptr, 0));
  pyconv_emulation_launches(records.data(), static_cast<int64_t>(records.size()));
  for (const PyconvEmulationLaunches& record : records) {
    std::cout << record.kernel << " " << record.max_threads << " " << record.max_shared_bytes << "\n";
  }
  return failures != 0;
}
