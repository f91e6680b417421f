// What the processor offers, and what this file's build assumes of it; for `info`.
#ifndef DIFFMIC_CPU_FEATURES_H_
#define DIFFMIC_CPU_FEATURES_H_

#include <string>
#include <vector>

namespace diffmic::cpu {

// Of the instruction sets that matter to kernels, those that the running processor has.
std::vector<std::string> AvailableInstructionSets();

// Those that the compiler was free to use anywhere: the extension runs on any processor that has
// them.
std::vector<std::string> AssumedInstructionSets();

const char* Architecture();

// Why the kernels with AMX's tiles cannot run here, or "". The first call asks the operating system
// for permission to use them, once a process; threads and forked children have it, too.
const std::string& WhyNoAmx();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_FEATURES_H_
