// Which instruction sets the kernels are compiled for, once for all of them; included before any Highway
// header. On x86: AVX3 (AVX-512), AVX2, and the portable one (plain C++, runs on every x86-64). The rest
// would only cost compile time: SSE4 machines are too old to matter. A stem that defines LAROSA_WITH_VNNI is
// compiled for AVX3_DL (AVX-512 with VNNI) as well; to the others it adds nothing. On 64-bit Arm: NEON, which
// every one of them has. SVE's vectors have no size at compile time, so that they can be no member of a Pair
// (simd-inl.h).
#pragma once

#ifdef LAROSA_WITH_VNNI
#define HWY_WANT_AVX3_DL
#endif
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
