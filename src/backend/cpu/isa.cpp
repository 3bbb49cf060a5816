#include "backend/cpu/isa.h"

#include <cstdlib>

#include "backend/cpu/targets.h"
#include "base/error.h"
#include "hwy/highway.h"
#include "oneapi/dnnl/dnnl.hpp"

#if HWY_ARCH_X86
#include <cpuid.h>
#endif

namespace larosa {
namespace {

/// Whose way to read memory (reading-inl.h).
enum class Reader { any, zen5, intel };

struct Isa {
  const char* name;
  int64_t targets;  // Highway's bits
  dnnl::cpu_isa onednn;
  Reader reader = Reader::any;  // on whatever machine
};

struct OneDnnIsa {
  unsigned bits;  // as oneDNN reports it
  const char* name;
};

constexpr unsigned bits(dnnl::cpu_isa isa) {
  return static_cast<unsigned>(isa);
}

#if HWY_ARCH_ARM_A64
constexpr Isa kIsas[] = {{"neon", HWY_NEON, dnnl::cpu_isa::all}};
// Arm's sets have numbers of x86's in oneDNN 2.6, and no names in its interface.
constexpr OneDnnIsa kOneDnnIsas[] = {{0x1, "asimd"}, {0x3, "sve_128"}, {0x7, "sve_256"}, {0x1f, "sve_512"}};
#elif HWY_ARCH_X86
// From avx512 on all that the machine has is oneDNN's: it then uses bf16 and AMX.
constexpr Isa kIsas[] = {{"portable", HWY_STATIC_TARGET, dnnl::cpu_isa::sse41},
                         {"avx2", HWY_AVX2, dnnl::cpu_isa::avx2},
                         {"avx512", HWY_AVX3, dnnl::cpu_isa::all},
                         {"avx512vnni", HWY_AVX3_DL | HWY_AVX3, dnnl::cpu_isa::all},
                         {"zen5", HWY_AVX3_DL | HWY_AVX3, dnnl::cpu_isa::all, Reader::zen5},
                         {"intel", HWY_AVX3_DL | HWY_AVX3, dnnl::cpu_isa::all, Reader::intel}};
constexpr OneDnnIsa kOneDnnIsas[] = {{bits(dnnl::cpu_isa::sse41), "sse41"},
                                     {bits(dnnl::cpu_isa::avx), "avx"},
                                     {bits(dnnl::cpu_isa::avx2), "avx2"},
                                     {bits(dnnl::cpu_isa::avx2_vnni), "avx2_vnni"},
                                     {bits(dnnl::cpu_isa::avx512_core), "avx512_core"},
                                     {bits(dnnl::cpu_isa::avx512_core_vnni), "avx512_core_vnni"},
                                     {bits(dnnl::cpu_isa::avx512_core_bf16), "avx512_core_bf16"},
                                     {bits(dnnl::cpu_isa::avx512_core_amx), "avx512_core_amx"}};
#else
constexpr Isa kIsas[] = {{"portable", HWY_STATIC_TARGET, dnnl::cpu_isa::all}};
constexpr OneDnnIsa kOneDnnIsas[] = {{0, "generic"}};
#endif

/// Whose AVX-512 with VNNI this is: AMD's family 1Ah, or Intel's.
Reader find_reader() {
#if HWY_ARCH_X86
  if ((hwy::SupportedTargets() & HWY_AVX3_DL) == 0) return Reader::any;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return Reader::any;
  const auto from = [&](unsigned b, unsigned c, unsigned d) { return ebx == b && ecx == c && edx == d; };
  if (from(signature_INTEL_ebx, signature_INTEL_ecx, signature_INTEL_edx)) return Reader::intel;
  if (!from(signature_AMD_ebx, signature_AMD_ecx, signature_AMD_edx)) return Reader::any;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Reader::any;
  return (eax >> 8 & 0xf) + (eax >> 20 & 0xff) == 0x1a ? Reader::zen5 : Reader::any;
#else
  return Reader::any;
#endif
}

const Isa* forced_isa() {
  const char* value = std::getenv("LAROSA_ISA");
  if (!value || !*value) return nullptr;
  std::string known;
  for (const Isa& isa : kIsas) {
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
    if (std::string(value) != isa.name) continue;
    const bool supported =
        isa.targets == HWY_STATIC_TARGET || (hwy::SupportedTargets() & isa.targets) == isa.targets;
    if (!supported) fail("LAROSA_ISA: this processor has no ", value);
    return &isa;
  }
  fail("LAROSA_ISA: '", value, "' is none of ", known);
}

}  // namespace

Kernels choose_kernels() {
  const Isa* forced = forced_isa();
  if (forced) {
    dnnl::set_max_cpu_isa(forced->onednn);
    hwy::SetSupportedTargetsForTest(forced->targets);
  }
  Kernels kernels{};
  fill_embed(kernels);
  fill_norm(kernels);
  fill_gemv(kernels);
  fill_topk(kernels);
  fill_rope(kernels);
  fill_attend(kernels);
  fill_glu(kernels);
  fill_softmax(kernels);
  if (forced) hwy::SetSupportedTargetsForTest(0);
  const auto read_by = [&](const Kernels::Gemv& gemv, const char* target) {
    if (gemv.chain == nullptr) return;  // Highway took another set than the one they are made for
    kernels.gemv_chain = gemv.chain;
    kernels.gemv_rows = gemv.rows;
    kernels.target = target;
  };
  const Reader reader = forced ? forced->reader : find_reader();
  if (reader == Reader::zen5) read_by(kernels.gemv_zen5, "AVX3_DL for Zen 5");
  if (reader == Reader::intel) read_by(kernels.gemv_intel, "AVX3_DL for Intel");
  return kernels;
}

std::string onednn_isa() {
  const unsigned used = bits(dnnl::get_effective_cpu_isa());
  for (const OneDnnIsa& isa : kOneDnnIsas) {
    if (isa.bits == used) return isa.name;
  }
  return "generic";
}

bool onednn_has_bf16() {
  constexpr unsigned bf16 = bits(dnnl::cpu_isa::avx512_core_bf16);
  // oneDNN's sets are bit masks, a superset has all bits; no set of Arm's has these.
  return (bits(dnnl::get_effective_cpu_isa()) & bf16) == bf16;
}

}  // namespace larosa
