// Which kernels were launched, how: for tests that every kernel was reached, and for the budget of resources.
#pragma once

#include <cstdint>

#include "runtime.h"

extern "C" {

struct PyconvEmulationLaunches {
  const char* kernel;   // symbol (mangled)
  int64_t count;        // of launches
  int64_t max_threads;  // of a block
  int64_t max_shared_bytes;
};

// Writes at most `capacity` records, one for each kernel launched since the last reset; gives back how many there are.
int64_t pyconv_emulation_launches(PyconvEmulationLaunches* records, int64_t capacity);
void pyconv_emulation_reset_launches();

// From now on launches are checked and recorded, but no kernel runs: pointers may be made up.
void pyconv_emulation_record_only(bool on);
}

namespace pyconv::emulation {

const char* kernel_symbol(const void* kernel);
void record_launch(const Launch& launch);
bool record_only();

}  // namespace pyconv::emulation
