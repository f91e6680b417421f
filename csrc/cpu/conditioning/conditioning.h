// The denoiser's first layer on the CPU. The definition is diffmic_fast/reference/conditioning.py,
// the arguments and the formulas are in include/conditioning_call.h.
//
// Work distribution. An output channel depends on no other one: a thread takes a few chunks of
// kChannels channels at a time, with all branches and rows, and its vectors lie across channels.
// Sums over rows belong to one thread, in the order of the rows, in double for statistics; sums
// over channels (the gradients of labels) are kept for each share of the chunks, whose number
// depends on F alone, and added up in order. So the bits do not depend on the number of threads,
// and in eval mode the result is batch-invariant.
//
// Kept for the backward pass: mean and variance, [2, S, F] floats, and the arguments. p, z and n
// are computed again, 2 C multiply-adds per element.
//
// Arithmetic, S = 3, B = 32, C = 5, F = 6144, an element being one of the S B F = 590 000:
//   forward: reads x, the rows of gamma and W, writes h1: 4 F (2 B + 2 C + 1 + S B) = 4.2 MB; some
//     60 operations per element (half of them in softplus), 35 MFLOP.
//   backward: reads these and the gradient of h1, writes those of x, W and the rows of gamma that
//     were used: 6 MB; some 110 operations per element, 65 MFLOP.
// Both are bound by operations on one core, and by memory on many. The gradient of gamma has all of
// its T + 1 rows, 25 MB of zeros that the caller writes: more than all the rest.
// The workspace of a thread is 3 B kChannels floats, and 4 C kChannels for weights; it stays in L1
// and L2 up to about B = 512.
#ifndef DIFFMIC_CPU_CONDITIONING_CONDITIONING_H_
#define DIFFMIC_CPU_CONDITIONING_CONDITIONING_H_

#include <string>
#include <vector>

#include "include/conditioning_call.h"

namespace diffmic::cpu::conditioning {

using namespace diffmic::conditioning;

struct Kernels;

// "auto" (the widest of this processor), or one of KernelNames(). NULL if there is none.
const Kernels* FindKernels(const std::string& name);
std::vector<std::string> KernelNames();

struct Options {
  const Kernels* kernels;
  int threads;
};

void Forward(const ForwardCall& call, const Options& options);
void Backward(const BackwardCall& call, const Options& options);

}  // namespace diffmic::cpu::conditioning

#endif  // DIFFMIC_CPU_CONDITIONING_CONDITIONING_H_
