// The C++ tests' only tool: CHECK counts failures and says where; main() returns check_result().
#pragma once

#include <cstdio>

inline int check_failures = 0;

#define CHECK(condition, ...)                                             \
  do {                                                                    \
    if (!(condition)) {                                                   \
      ++check_failures;                                                   \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                  \
      std::fprintf(stderr, "\n");                                         \
    }                                                                     \
  } while (false)

inline int check_result() {
  if (check_failures != 0) std::fprintf(stderr, "%d checks failed\n", check_failures);
  return check_failures == 0 ? 0 : 1;
}
