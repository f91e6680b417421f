// What the processor offers, and what this file's build assumes of it; for `info`.
#ifndef DIFFMIC_CPU_COMMON_CPU_CAPABILITIES_H_
#define DIFFMIC_CPU_COMMON_CPU_CAPABILITIES_H_

#include <string>
#include <vector>

namespace diffmic::cpu {

// Of the instruction sets that matter to kernels, those that the running processor has.
std::vector<std::string> AvailableInstructionSets();

// Those that the compiler was free to use anywhere: the extension runs on any processor that has
// them.
std::vector<std::string> AssumedInstructionSets();

const char* Architecture();

// Requirements of the AMX kernels.
struct AmxFacts {
  bool built = true;       // the assembler knew the instructions
  bool linux_x86 = false;  // permission is requested from Linux
  bool processor = false;  // has the instructions for tiles, bfloat16 and bytes
  bool saved = false;      // the operating system enables AMX state (XCR0)
  int refused = 0;         // errno of the request for permission
};

// Reason why AMX is unavailable; empty if available.
std::string AmxObstacle(const AmxFacts& facts);

// The same of this process. The first call requests permission, once: the answer holds for all
// threads and for forked children. With permission, signal frames grow by 8 KB, and Linux refuses
// alternate signal stacks that are too small for them.
const std::string& WhyNoAmx();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_COMMON_CPU_CAPABILITIES_H_
