#include "backend/cpu/isa.h"

#include <cstdlib>

#include "backend/cpu/targets.h"
#include "base/error.h"
#include "hwy/highway.h"
#include "oneapi/dnnl/dnnl.hpp"

namespace larosa {
namespace {

struct Isa {
  const char* name;
  int64_t targets;  // Highway's bits
  dnnl::cpu_isa onednn;
};

#if HWY_ARCH_X86
// avx512 and avx512vnni stand for all that the machine has for oneDNN: it then uses bf16 and AMX.
constexpr Isa kIsas[] = {{"portable", HWY_STATIC_TARGET, dnnl::cpu_isa::sse41},
                         {"avx2", HWY_AVX2, dnnl::cpu_isa::avx2},
                         {"avx512", HWY_AVX3, dnnl::cpu_isa::all},
                         {"avx512vnni", HWY_AVX3_DL | HWY_AVX3, dnnl::cpu_isa::all}};
#else
constexpr Isa kIsas[] = {{"portable", HWY_STATIC_TARGET, dnnl::cpu_isa::all}};
#endif

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
  return kernels;
}

std::string onednn_isa() {
  switch (dnnl::get_effective_cpu_isa()) {
    case dnnl::cpu_isa::sse41:
      return "sse41";
    case dnnl::cpu_isa::avx:
      return "avx";
    case dnnl::cpu_isa::avx2:
      return "avx2";
    case dnnl::cpu_isa::avx2_vnni:
      return "avx2_vnni";
    case dnnl::cpu_isa::avx512_core:
      return "avx512_core";
    case dnnl::cpu_isa::avx512_core_vnni:
      return "avx512_core_vnni";
    case dnnl::cpu_isa::avx512_core_bf16:
      return "avx512_core_bf16";
    case dnnl::cpu_isa::avx512_core_amx:
      return "avx512_core_amx";
    default:
      return "generic";
  }
}

bool onednn_has_bf16() {
  const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  const auto bf16 = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
  return (isa & bf16) == bf16;  // oneDNN's sets are bit masks, a superset has all bits
}

}  // namespace larosa
