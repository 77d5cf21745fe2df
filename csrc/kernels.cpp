// One instruction set's kernels. Compiled once for each, with its flags and LOKI_ISA set to its name.
//
// Everything below lives in an unnamed namespace and only C functions are called: no symbol leaves this file that the
// linker could share with, or take from, a file compiled for a lesser machine.
#include "types.hpp"

#include <math.h>
#include <string.h>
#if defined(LOKI_USE_AVX512) || defined(LOKI_USE_AVX2)
#include <immintrin.h>
#endif

// Where a call costs as much as what it does.
#define LOKI_INLINE inline __attribute__((always_inline))

namespace loki {
namespace {

#include "scalars.hpp"
#if defined(LOKI_USE_AVX512)
#define LOKI_BF16_DOT
#include "simd_avx512.hpp"
#elif defined(LOKI_USE_AVX2)
#include "simd_avx2.hpp"
#else
#include "simd_portable.hpp"
#endif

#include "math.hpp"

#include "encode.hpp"
#include "score.hpp"

#include "sample.hpp"
#include "select.hpp"

#include "attend.hpp"

#include "finish.hpp"

#include "absorb.hpp"
#include "probe.hpp"

}  // namespace

#define LOKI_JOIN_(A, B) A##B
#define LOKI_JOIN(A, B) LOKI_JOIN_(A, B)
extern const Kernels LOKI_JOIN(LOKI_ISA, _kernels);
const Kernels LOKI_JOIN(LOKI_ISA, _kernels) = {encode_keys, encode_query, begin_scores, score,  select, tail_value,
                                               attend,      finish,       absorb,       stream, gather};

}  // namespace loki
