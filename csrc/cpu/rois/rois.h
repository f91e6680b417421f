// Regions of interest on the CPU: the windows of highest saliency, and the crops cut there. The
// definition is diffmic_fast/reference/rois.py; these give its bits.
#ifndef DIFFMIC_CPU_ROIS_ROIS_H_
#define DIFFMIC_CPU_ROIS_ROIS_H_

#include <cstdint>

#include "include/rois_call.h"

namespace diffmic::cpu {

using rois::ChooseCall;
using rois::CutCall;
using rois::Maps;
using rois::Pairs;
using rois::Size;
using rois::Type;

// Returns the first image whose saliency is not finite in float32 (or whose range is not), -1 if
// there is none; otherwise the cells are unspecified.
std::int64_t ChooseWindows(const ChooseCall& call, int threads);

// origins[i] = (round(i / grid.height * image.height), the same of columns) of `count` cells,
// halves to even, in double; both compact [count, 2].
void CellsToPixels(const std::int64_t* cells, std::int64_t count, Size grid, Size image,
                   std::int64_t* origins);

void CutCrops(const CutCall& call, int threads);

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_ROIS_ROIS_H_
