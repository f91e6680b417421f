// The instruction sets that kernels are compiled for, and what this processor has.
#ifndef DIFFMIC_CPU_COMMON_CPU_CAPABILITIES_H_
#define DIFFMIC_CPU_COMMON_CPU_CAPABILITIES_H_

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace diffmic::cpu {

// kAuto is the widest one of this processor. kAmxEmulated, AMX emulated on AVX2, is selected only
// by name.
enum class Isa { kAuto, kAmx, kAvx512Bf16, kAvx512, kAvx2, kPortable, kAmxEmulated };

// "auto", "amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated".
const char* IsaName(Isa isa);
std::optional<Isa> IsaOf(const std::string& name);

// Whether this processor and operating system have it. kAmx requests permission (WhyNoAmx).
bool HasIsa(Isa isa);

// An operation's kernels for an instruction set. Tables of these are in order of preference.
template <typename Kernels>
struct IsaEntry {
  Isa isa;
  const Kernels* kernels;
};

// The kernels for an instruction set, or null if this build or this processor does not have it.
template <typename Kernels, std::size_t kCount>
const Kernels* FindKernels(const IsaEntry<Kernels> (&table)[kCount], std::optional<Isa> isa) {
  for (const IsaEntry<Kernels>& entry : table) {
    const bool wanted = isa == Isa::kAuto ? entry.isa != Isa::kAmxEmulated : entry.isa == isa;
    if (wanted && HasIsa(entry.isa)) return entry.kernels;
  }
  return nullptr;
}

// The names of a table's instruction sets that this processor has.
template <typename Kernels, std::size_t kCount>
std::vector<std::string> IsaNames(const IsaEntry<Kernels> (&table)[kCount]) {
  std::vector<std::string> names;
  for (const IsaEntry<Kernels>& entry : table) {
    if (HasIsa(entry.isa)) names.emplace_back(IsaName(entry.isa));
  }
  return names;
}

// The CPU features relevant to kernels that this processor has, for `info`.
std::vector<std::string> AvailableInstructionSets();

// Those that the compiler may use anywhere: the extension requires them.
std::vector<std::string> AssumedInstructionSets();

const char* Architecture();

// Requirements of the AMX kernels.
struct AmxFacts {
  bool built = true;       // the assembler supports the instructions
  bool linux_x86 = false;  // permission is requested from Linux
  bool processor = false;  // has amx_tile, amx_bf16 and amx_int8
  bool saved = false;      // the operating system enables AMX state (XCR0)
  int refused = 0;         // errno of the request for permission
};

// Reason why AMX is unavailable; empty if available.
std::string AmxObstacle(const AmxFacts& facts);

// The same for this process. The first call requests permission, once, for all threads and forked
// children. With permission, signal frames grow by 8 KB, and Linux refuses alternate signal stacks
// that are too small for them.
const std::string& WhyNoAmx();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_COMMON_CPU_CAPABILITIES_H_
