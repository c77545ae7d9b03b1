// The race checker, where the library is compiled with PYCONV_EMULATION_RACES; nothing elsewhere. It sees each access
// of the kernels to shared memory through the calls that -fsanitize=thread puts beside it (its runtime is not linked).
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace pyconv::emulation {

#if defined(PYCONV_EMULATION_RACES)
void races_begin_block();
void races_end_block();
void races_block_barrier();
void races_warp_barrier(uint32_t lanes);
void record_read(const void* from, size_t bytes, Site site);
void record_copy_begin(const void* to, size_t bytes, Site site);
void record_copy_end(const void* to, size_t bytes, Site site);
#else
inline void races_begin_block() {}
inline void races_end_block() {}
inline void races_block_barrier() {}
inline void races_warp_barrier(uint32_t /*lanes*/) {}
inline void record_read(const void* /*from*/, size_t /*bytes*/, Site /*site*/) {}
inline void record_copy_begin(const void* /*to*/, size_t /*bytes*/, Site /*site*/) {}
inline void record_copy_end(const void* /*to*/, size_t /*bytes*/, Site /*site*/) {}
#endif

}  // namespace pyconv::emulation
