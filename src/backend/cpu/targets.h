// Which instruction sets the kernels are compiled for, once for all of them; included before any Highway
// header. On x86: AVX3 (AVX-512), AVX2, and the portable one (plain C++, runs on every x86-64). The rest
// would only cost compile time: SSE4 machines are too old to matter, and AVX3_DL adds nothing that these
// kernels use.
#pragma once

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
