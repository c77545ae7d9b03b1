/* The machine's multiply-add peak, as a loop that touches no memory: the denominator of "fraction of peak".
 *
 * Built with -march=native at the time of the run. Twelve accumulators hide a latency of 4 to 5 cycles on two
 * FMA ports; compiler vectors give the widest registers the machine has without naming an instruction set. */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

enum { ACCUMULATORS = 12 };

/* fma_loop_T returns the FLOPs done by `iterations` passes; *sink keeps the result alive. */
#define DEFINE_FMA_LOOP(T)                                                                  \
    typedef T T##_vector __attribute__((vector_size(VECTOR_BYTES)));                        \
    double fma_loop_##T(long iterations, T* sink) {                                         \
        enum { LANES = VECTOR_BYTES / sizeof(T) };                                          \
        T##_vector sum[ACCUMULATORS];                                                       \
        T##_vector factor, addend;                                                          \
        for (int lane = 0; lane < LANES; ++lane) {                                          \
            factor[lane] = (T)0.999;                                                        \
            addend[lane] = (T)0.001;                                                        \
        }                                                                                   \
        for (int i = 0; i < ACCUMULATORS; ++i)                                              \
            for (int lane = 0; lane < LANES; ++lane) sum[i][lane] = (T)(i + lane);          \
        for (long n = 0; n < iterations; ++n)                                               \
            for (int i = 0; i < ACCUMULATORS; ++i) sum[i] = sum[i] * factor + addend;       \
        for (int i = 0; i < ACCUMULATORS; ++i) *sink += sum[i][0];                          \
        return 2.0 * LANES * ACCUMULATORS * (double)iterations;                             \
    }

DEFINE_FMA_LOOP(float)
DEFINE_FMA_LOOP(double)
