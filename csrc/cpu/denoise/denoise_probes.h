// Access patterns of the memory bandwidth probe (DenoiseKernels::read, denoise_probes.inc.h).
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_PROBES_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_PROBES_H_

namespace diffmic::cpu {

// Contiguous parts of the array that are read concurrently, and the prefetch distance to L2 in
// bytes (0: no prefetching).
struct Reader {
  int streams;
  int ahead;
};

inline constexpr Reader kReaders[] = {{1, 0},    {2, 0},    {4, 0},    {8, 0},
                                      {1, 4096}, {2, 4096}, {4, 1024}, {4, 4096},
                                      {8, 1024}, {8, 4096}, {8, 16384}};

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_PROBES_H_
