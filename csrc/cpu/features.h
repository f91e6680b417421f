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

// What has to be true for AMX's tiles to be used. Permission is Linux's: it is asked for once a
// process, since a thread's signal frames grow by the tiles' 8 KB.
struct AmxFacts {
  bool processor = false;  // has the instructions for tiles, bfloat16 and bytes
  bool saved = false;      // the operating system saves the tiles (XCR0)
  int refused = 0;         // errno of the request for permission
};

// What stands in the way, or "".
std::string AmxObstacle(const AmxFacts& facts);

// Why the kernels with AMX's tiles cannot run here, or "". The first call asks the operating system
// for permission to use them, once a process; threads and forked children have it, too.
const std::string& WhyNoAmx();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_FEATURES_H_
