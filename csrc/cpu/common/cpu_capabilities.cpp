#include "cpu/common/cpu_capabilities.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cerrno>
#include <cstring>
#include <iterator>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace diffmic::cpu {
namespace {

constexpr const char* kIsaNames[] = {"auto", "amx",      "avx512_bf16", "avx512",
                                     "avx2", "portable", "amx_emulated"};

}  // namespace

const char* IsaName(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

std::optional<Isa> IsaOf(const std::string& name) {
  for (std::size_t i = 0; i < std::size(kIsaNames); ++i) {
    if (name == kIsaNames[i]) return static_cast<Isa>(i);
  }
  return std::nullopt;
}

bool HasIsa(Isa isa) {
  switch (isa) {
    case Isa::kAuto:
    case Isa::kPortable:
      return true;
#if defined(__x86_64__)
    case Isa::kAvx2:
    case Isa::kAmxEmulated:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return HasIsa(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bw");
    case Isa::kAvx512Bf16:
      return HasIsa(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni") &&
             __builtin_cpu_supports("avx512bf16");
    case Isa::kAmx:
      return HasIsa(Isa::kAvx512Bf16) && WhyNoAmx().empty();
#endif
    default:
      return false;
  }
}

#if defined(__x86_64__) || defined(__i386__)

std::vector<std::string> AvailableInstructionSets() {
  std::vector<std::string> names;
  // The builtin takes a literal, and also checks that the system saves the wider registers.
#define DIFFMIC_ADD_IF_SUPPORTED(name) \
  if (__builtin_cpu_supports(name)) names.emplace_back(name)
  __builtin_cpu_init();
  DIFFMIC_ADD_IF_SUPPORTED("sse2");
  DIFFMIC_ADD_IF_SUPPORTED("sse4.2");
  DIFFMIC_ADD_IF_SUPPORTED("avx");
  DIFFMIC_ADD_IF_SUPPORTED("avx2");
  DIFFMIC_ADD_IF_SUPPORTED("fma");
  DIFFMIC_ADD_IF_SUPPORTED("avx512f");
  DIFFMIC_ADD_IF_SUPPORTED("avx512bw");
  DIFFMIC_ADD_IF_SUPPORTED("avx512vl");
  DIFFMIC_ADD_IF_SUPPORTED("avx512vnni");
  DIFFMIC_ADD_IF_SUPPORTED("avx512bf16");
  if (WhyNoAmx().empty()) names.emplace_back("amx");
#undef DIFFMIC_ADD_IF_SUPPORTED
  return names;
}

#elif defined(__aarch64__) && defined(__linux__)

std::vector<std::string> AvailableInstructionSets() {
  std::vector<std::string> names;
  const unsigned long first = getauxval(AT_HWCAP);
  const unsigned long second = getauxval(AT_HWCAP2);
  if (first & HWCAP_ASIMD) names.emplace_back("neon");
  if (first & HWCAP_ASIMDHP) names.emplace_back("fp16");
#if defined(HWCAP_ASIMDDP)
  if (first & HWCAP_ASIMDDP) names.emplace_back("dotprod");
#endif
#if defined(HWCAP_SVE)
  if (first & HWCAP_SVE) names.emplace_back("sve");
#endif
#if defined(HWCAP2_SVE2)
  if (second & HWCAP2_SVE2) names.emplace_back("sve2");
#endif
#if defined(HWCAP2_BF16)
  if (second & HWCAP2_BF16) names.emplace_back("bf16");
#endif
  static_cast<void>(second);
  return names;
}

#else

std::vector<std::string> AvailableInstructionSets() { return AssumedInstructionSets(); }

#endif

std::string AmxObstacle(const AmxFacts& facts) {
  if (!facts.built) return "the assembler of this build does not know AMX (GNU as before 2.36)";
  if (!facts.linux_x86) return "AMX needs Linux on x86-64";
  if (!facts.processor) return "the processor has no AMX (amx_tile, amx_bf16, amx_int8)";
  if (!facts.saved) return "the operating system does not enable AMX state (XCR0)";
  if (facts.refused == ENOSPC) {
    return "the kernel refused permission for AMX: a thread's alternate signal stack is too small";
  }
  if (facts.refused != 0) {
    return std::string("the kernel refused permission for AMX (arch_prctl: ") +
           std::strerror(facts.refused) + ")";
  }
  return "";
}

namespace {

AmxFacts FindAmx() {
  AmxFacts facts;
#if defined(DIFFMIC_NO_AMX)
  facts.built = false;
#endif
#if defined(__x86_64__) && defined(__linux__)
  facts.linux_x86 = true;
  if (!facts.built) return facts;
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tile, int8
  facts.processor = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAll) == kAll;
  constexpr unsigned kOsxsave = 1u << 27, kTileState = 3u << 17;
  if (facts.processor && __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kOsxsave) != 0) {
    unsigned low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    facts.saved = (low & kTileState) == kTileState;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  if (facts.saved && syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    facts.refused = errno;
  }
#endif
  return facts;
}

}  // namespace

const std::string& WhyNoAmx() {
  static const std::string reason = AmxObstacle(FindAmx());
  return reason;
}

std::vector<std::string> AssumedInstructionSets() {
  std::vector<std::string> names;
#if defined(__SSE2__)
  names.emplace_back("sse2");
#endif
#if defined(__AVX2__)
  names.emplace_back("avx2");
#endif
#if defined(__FMA__)
  names.emplace_back("fma");
#endif
#if defined(__AVX512F__)
  names.emplace_back("avx512f");
#endif
#if defined(__ARM_NEON)
  names.emplace_back("neon");
#endif
  return names;
}

const char* Architecture() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#elif defined(__i386__)
  return "i386";
#elif defined(__riscv)
  return "riscv";
#elif defined(__powerpc64__)
  return "ppc64";
#else
  return "unknown";
#endif
}

}  // namespace diffmic::cpu
