// Selection of regions of interest for a batch, and extraction of their crops
// (docs/algorithm.md, "Regions of interest").
//
// ChooseWindows. A thread takes whole images. The saliency of each class is widened to float32,
// normalised by its range and added to one map. The mean of every window is summed in the order of
// the reference (cells in row-major order), with loops interchanged so that the innermost one runs
// over adjacent windows and vectorises. After a window is chosen only the means of windows that
// overlap it change, so each of the K - 1 later rounds updates (2 wh - 1)(2 ww - 1) windows.
//   Arithmetic: C h w + (h w + K (2 wh - 1)(2 ww - 1)) wh ww additions per image; at 7 x 7 cells a
//   few thousand, on 1 KB per class: bound by the latency of short loops.
//
// CutCrops. A thread takes whole crops. The minimum of an image's channels is computed only if one
// of its crops leaves the image. Rows of unit stride are copied by memcpy, others element by
// element; repeats of a channel are copied from the first crop.
//   Bytes: every crop is written once and its pixels are read once, plus one read of each image
//   whose minimum is needed: 32 images of 224 x 224 float32 with K = 6 write 2.4 MB and read 0.8
//   MB, or 6.4 MB more with all minima. Bound by memory.
#include "cpu/rois/rois.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/common/parallel.h"

namespace diffmic::cpu {
namespace {

// Bits of 16-bit floating-point saliency.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

float FromBits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float Widen(float value) { return value; }
float Widen(double value) { return static_cast<float>(value); }
float Widen(BFloat16 value) { return FromBits(std::uint32_t{value.bits} << 16); }
float Widen(Half value) {
  const std::uint32_t sign = std::uint32_t{value.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return FromBits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude < 0x400u) {
    // A subnormal is an integer multiple of 2^-24, and normal in float32.
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return FromBits(sign | ((magnitude << 13) + (112u << 23)));  // exponent bias 127, not 15
}

// ---- selection of windows

// A thread's workspace: the map of all classes and the mean of every window.
struct WindowSearch {
  WindowSearch(const Maps& saliency, Size window_size)
      : height(saliency.height),
        width(saliency.width),
        window(window_size),
        rows(height - window.height + 1),
        columns(width - window.width + 1),
        scaled(static_cast<std::size_t>(height * width)),
        map(static_cast<std::size_t>(height * width)),
        means(static_cast<std::size_t>(rows * columns)) {}

  // Adds one class to the map; false if its saliency or its range is not finite.
  template <typename T>
  bool AddClass(const T* plane, std::int64_t row_stride, std::int64_t column_stride) {
    float low = std::numeric_limits<float>::infinity();
    float high = -std::numeric_limits<float>::infinity();
    bool nan = false;
    float* cell = scaled.data();
    for (std::int64_t row = 0; row < height; ++row) {
      for (std::int64_t column = 0; column < width; ++column) {
        const float value = Widen(plane[row * row_stride + column * column_stride]);
        nan |= value != value;
        low = std::min(low, value);
        high = std::max(high, value);
        *cell++ = value;
      }
    }
    const float extent = high - low;
    if (nan || !std::isfinite(extent)) return false;
    if (extent > 0) {
      for (std::size_t i = 0; i < map.size(); ++i) map[i] += (scaled[i] - low) / extent;
    }
    return true;
  }

  // Updates the means of windows whose upper-left cells are in [top, bottom) x [left, right).
  void UpdateMeans(std::int64_t top, std::int64_t bottom, std::int64_t left, std::int64_t right) {
    const auto cells_inside = static_cast<float>(window.height * window.width);
    for (std::int64_t row = top; row < bottom; ++row) {
      float* mean = means.data() + row * columns;
      std::fill(mean + left, mean + right, 0.0f);
      for (std::int64_t i = 0; i < window.height; ++i) {
        const float* line = map.data() + (row + i) * width;
        for (std::int64_t j = 0; j < window.width; ++j) {
          for (std::int64_t column = left; column < right; ++column) {
            mean[column] += line[column + j];
          }
        }
      }
      for (std::int64_t column = left; column < right; ++column) mean[column] /= cells_inside;
    }
  }

  void Choose(std::int64_t count, std::int64_t* cells) {
    UpdateMeans(0, rows, 0, columns);
    for (std::int64_t k = 0; k < count; ++k) {
      // max_element returns the first of equal values, as the reference does.
      const std::int64_t best = std::max_element(means.begin(), means.end()) - means.begin();
      const std::int64_t row = best / columns;
      const std::int64_t column = best % columns;
      cells[2 * k] = row;
      cells[2 * k + 1] = column;
      for (std::int64_t i = 0; i < window.height; ++i) {
        float* line = map.data() + (row + i) * width + column;
        std::fill(line, line + window.width, 0.0f);
      }
      UpdateMeans(std::max<std::int64_t>(row - window.height + 1, 0),
                  std::min(row + window.height, rows),
                  std::max<std::int64_t>(column - window.width + 1, 0),
                  std::min(column + window.width, columns));
    }
  }

  std::int64_t height, width;
  Size window;
  std::int64_t rows, columns;
  std::vector<float> scaled;
  std::vector<float> map;
  std::vector<float> means;
};

template <typename T>
std::int64_t ChooseWindowsOf(const Maps& saliency, Size window, std::int64_t count,
                             std::int64_t* cells, int threads) {
  std::atomic<std::int64_t> first_bad{saliency.batch};
  // A thread pays off from some 64K additions on.
  const std::int64_t work = saliency.height * saliency.width *
                            (saliency.depth * 2 + window.height * window.width + count);
  ParallelFor(saliency.batch, threads, 1 + 65536 / work, [&](std::int64_t begin, std::int64_t end) {
    WindowSearch search(saliency, window);
    for (std::int64_t image = begin; image < end; ++image) {
      const T* planes = static_cast<const T*>(saliency.data) + image * saliency.stride[0];
      std::fill(search.map.begin(), search.map.end(), 0.0f);
      bool finite = true;
      for (std::int64_t c = 0; finite && c < saliency.depth; ++c) {
        finite = search.AddClass(planes + c * saliency.stride[1], saliency.stride[2],
                                 saliency.stride[3]);
      }
      if (!finite) {
        std::int64_t seen = first_bad.load();
        while (image < seen && !first_bad.compare_exchange_weak(seen, image)) {
        }
        return;
      }
      search.Choose(count, cells + image * count * 2);
    }
  });
  return first_bad == saliency.batch ? -1 : first_bad.load();
}

// ---- crops

struct Plane {
  std::int64_t height, width, row_stride, column_stride;
};

// Calls each(pixel). The two loops differ in that the compiler knows the first one's stride.
template <typename Pixel, typename Each>
void ForEachPixel(const Pixel* data, const Plane& plane, const Each& each) {
  for (std::int64_t row = 0; row < plane.height; ++row) {
    const Pixel* line = data + row * plane.row_stride;
    if (plane.column_stride == 1) {
      for (std::int64_t i = 0; i < plane.width; ++i) each(line[i]);
    } else {
      for (std::int64_t i = 0; i < plane.width; ++i) each(line[i * plane.column_stride]);
    }
  }
}

// The minimum of a plane by pixel type; NaN if any pixel is NaN.

// float and double: four vectors of running minima, since a single one is a chain of dependent
// comparisons that the compiler may not reorder.
template <typename Float>
struct FloatMinimum {
  using Flag = std::conditional_t<sizeof(Float) == 4, std::int32_t, std::int64_t>;
  // 16 bytes: every x86-64 and ARMv8 processor has them.
  using Vector [[gnu::vector_size(16)]] = Float;
  using Flags [[gnu::vector_size(16)]] = Flag;
  static constexpr std::int64_t kWidth = 16 / sizeof(Float);

  static Float Minimum(const Float* data, const Plane& plane) {
    constexpr Float kInfinity = std::numeric_limits<Float>::infinity();
    Vector low0 = Vector{} + kInfinity, low1 = low0, low2 = low0, low3 = low0;
    Flags unordered = {};
    Float low = kInfinity;
    bool nan = false;
    for (std::int64_t row = 0; row < plane.height; ++row) {
      const Float* line = data + row * plane.row_stride;
      std::int64_t column = 0;
      if (plane.column_stride == 1) {
        for (; column + 4 * kWidth <= plane.width; column += 4 * kWidth) {
          Fold(line + column, &low0, &unordered);
          Fold(line + column + kWidth, &low1, &unordered);
          Fold(line + column + 2 * kWidth, &low2, &unordered);
          Fold(line + column + 3 * kWidth, &low3, &unordered);
        }
      }
      for (; column < plane.width; ++column) {
        const Float value = line[column * plane.column_stride];
        low = std::min(low, value);
        nan |= value != value;
      }
    }
    for (std::int64_t i = 0; i < kWidth; ++i) {
      low = std::min({low, low0[i], low1[i], low2[i], low3[i]});
      nan |= unordered[i] != 0;
    }
    return nan ? std::numeric_limits<Float>::quiet_NaN() : low;
  }

 private:
  static void Fold(const Float* line, Vector* low, Flags* unordered) {
    Vector values;
    std::memcpy(&values, line, sizeof values);
    *low = values < *low ? values : *low;
    *unordered |= values != values;
  }
};

// float16 and bfloat16: as integers, with the magnitude bits of negative values inverted, their bit
// patterns order as their values. No half-precision instructions are needed.
template <std::uint16_t kInfinity, std::uint16_t kNaN>
struct HalfMinimum {
  static std::uint16_t Minimum(const std::uint16_t* data, const Plane& plane) {
    std::int16_t low = std::numeric_limits<std::int16_t>::max();
    std::uint16_t largest = 0;  // magnitude
    ForEachPixel(data, plane, [&](std::uint16_t bits) {
      low = std::min(low, Ordered(static_cast<std::int16_t>(bits)));
      largest = std::max(largest, static_cast<std::uint16_t>(bits & 0x7FFF));
    });
    return largest > kInfinity ? kNaN : static_cast<std::uint16_t>(Ordered(low));
  }

 private:
  static std::int16_t Ordered(std::int16_t bits) {  // its own inverse
    return static_cast<std::int16_t>(bits ^ ((bits >> 15) & 0x7FFF));
  }
};

struct ByteMinimum {
  static std::uint8_t Minimum(const std::uint8_t* data, const Plane& plane) {
    std::uint8_t low = 255;
    ForEachPixel(data, plane, [&](std::uint8_t value) { low = std::min(low, value); });
    return low;
  }
};

// The pixels [begin, begin + length) of one image dimension that a crop covers.
struct Span {
  std::int64_t begin, length;
};

// `origin` may be any int64: the comparisons guard the sum against overflow.
Span Covered(std::int64_t origin, std::int64_t length, std::int64_t side) {
  if (origin >= side || origin <= -length) return {0, 0};
  const std::int64_t begin = std::max<std::int64_t>(origin, 0);
  const std::int64_t end = std::min(origin + length, side);
  return {begin, end - begin};
}

bool Leaves(std::int64_t origin, std::int64_t length, std::int64_t side) {
  return origin < 0 || origin > side - length;
}

template <typename Pixel>
struct Cutter {
  // One crop of one channel: the covered pixels at the lower right, `fill` above and left of them.
  void Cut(const Pixel* plane, std::int64_t top, std::int64_t left, Pixel fill, Pixel* crop) const {
    const Span rows = Covered(top, size.height, images.height);
    Span columns = Covered(left, size.width, images.width);
    if (rows.length == 0) columns.length = 0;
    const std::int64_t margin = size.width - columns.length;
    const std::int64_t above = columns.length ? size.height - rows.length : size.height;
    crop = std::fill_n(crop, above * size.width, fill);
    const std::int64_t column_stride = images.stride[3];
    for (std::int64_t row = above; row < size.height; ++row) {
      crop = std::fill_n(crop, margin, fill);
      const Pixel* line =
          plane + (rows.begin + row - above) * images.stride[2] + columns.begin * column_stride;
      if (column_stride == 1) {
        std::memcpy(crop, line, static_cast<std::size_t>(columns.length) * sizeof(Pixel));
      } else {
        for (std::int64_t i = 0; i < columns.length; ++i) crop[i] = line[i * column_stride];
      }
      crop += columns.length;
    }
  }

  const Maps& images;
  Size size;
};

template <typename Pixel, typename PlaneMinimum>
void CutCropsOf(const Maps& images, const Pairs& origins, std::int64_t count, Size size,
                std::int64_t copies, void* crops, int threads) {
  const Pixel* pixels = static_cast<const Pixel*>(images.data);
  const std::int64_t plane_count = images.batch * images.depth;
  const auto plane_of = [&](std::int64_t index) {
    return pixels + index / images.depth * images.stride[0] +
           index % images.depth * images.stride[1];
  };
  const auto origin_of = [&](std::int64_t image, std::int64_t k, int axis) {
    return origins
        .data[image * origins.stride[0] + k * origins.stride[1] + axis * origins.stride[2]];
  };

  std::vector<std::int64_t> outside;  // planes whose minimum is needed
  for (std::int64_t image = 0; image < images.batch; ++image) {
    for (std::int64_t k = 0; k < count; ++k) {
      if (Leaves(origin_of(image, k, 0), size.height, images.height) ||
          Leaves(origin_of(image, k, 1), size.width, images.width)) {
        for (std::int64_t c = 0; c < images.depth; ++c) outside.push_back(image * images.depth + c);
        break;
      }
    }
  }
  std::vector<Pixel> fills(outside.empty() ? 0 : static_cast<std::size_t>(plane_count));
  // A thread pays off from four megabytes read or written (150 us) on.
  constexpr std::int64_t kGrainBytes = 4 * 1024 * 1024;
  const Plane plane{images.height, images.width, images.stride[2], images.stride[3]};
  const std::int64_t plane_bytes =
      images.height * images.width * static_cast<std::int64_t>(sizeof(Pixel));
  ParallelFor(static_cast<std::int64_t>(outside.size()), threads,
              1 + kGrainBytes / std::max<std::int64_t>(plane_bytes, 1),
              [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) {
                  const std::int64_t index = outside[static_cast<std::size_t>(i)];
                  fills[static_cast<std::size_t>(index)] =
                      PlaneMinimum::Minimum(plane_of(index), plane);
                }
              });

  const Cutter<Pixel> cutter{images, size};
  const std::int64_t area = size.height * size.width;
  const std::int64_t crop_elements = images.depth * copies * area;
  const std::int64_t crop_bytes = crop_elements * static_cast<std::int64_t>(sizeof(Pixel));
  ParallelFor(
      images.batch * count, threads, 1 + kGrainBytes / std::max<std::int64_t>(crop_bytes, 1),
      [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
          const std::int64_t image = item / count;
          const std::int64_t k = item % count;
          Pixel* crop = static_cast<Pixel*>(crops) + item * crop_elements;
          for (std::int64_t c = 0; c < images.depth; ++c) {
            const std::int64_t index = image * images.depth + c;
            // Unused if the crop is inside its image.
            const Pixel fill = fills.empty() ? Pixel{0} : fills[static_cast<std::size_t>(index)];
            cutter.Cut(plane_of(index), origin_of(image, k, 0), origin_of(image, k, 1), fill, crop);
            for (std::int64_t copy = 1; copy < copies; ++copy) {
              std::memcpy(crop + copy * area, crop, static_cast<std::size_t>(area) * sizeof(Pixel));
            }
            crop += copies * area;
          }
        }
      });
}

}  // namespace

std::int64_t ChooseWindows(const ChooseCall& call, int threads) {
  const auto& [saliency, type, window, count, cells] = call;
  if (saliency.batch == 0) return -1;
  switch (type) {
    case Type::kUInt8:
      return -1;  // no saliency has this type
    case Type::kFloat16:
      return ChooseWindowsOf<Half>(saliency, window, count, cells, threads);
    case Type::kBFloat16:
      return ChooseWindowsOf<BFloat16>(saliency, window, count, cells, threads);
    case Type::kFloat32:
      return ChooseWindowsOf<float>(saliency, window, count, cells, threads);
    case Type::kFloat64:
      return ChooseWindowsOf<double>(saliency, window, count, cells, threads);
  }
  return -1;
}

void CellsToPixels(const std::int64_t* cells, std::int64_t count, Size grid, Size image,
                   std::int64_t* origins) {
  const auto pixel = [](std::int64_t cell, std::int64_t cells_in_all, std::int64_t pixels) {
    const double share = static_cast<double>(cell) / static_cast<double>(cells_in_all);
    return static_cast<std::int64_t>(std::nearbyint(share * static_cast<double>(pixels)));
  };
  for (std::int64_t i = 0; i < count; ++i) {
    origins[2 * i] = pixel(cells[2 * i], grid.height, image.height);
    origins[2 * i + 1] = pixel(cells[2 * i + 1], grid.width, image.width);
  }
}

void CutCrops(const CutCall& call, int threads) {
  const auto& [images, type, cut, crops] = call;
  const auto& [origins, count, size, copies] = cut;
  if (images.batch == 0 || images.depth == 0 || count == 0) return;
  if (size.height == 0 || size.width == 0) return;
  using Float16Minimum = HalfMinimum<0x7C00, 0x7E00>;
  using BFloat16Minimum = HalfMinimum<0x7F80, 0x7FC0>;
  switch (type) {
    case Type::kUInt8:
      return CutCropsOf<std::uint8_t, ByteMinimum>(images, origins, count, size, copies, crops,
                                                   threads);
    case Type::kFloat16:
      return CutCropsOf<std::uint16_t, Float16Minimum>(images, origins, count, size, copies, crops,
                                                       threads);
    case Type::kBFloat16:
      return CutCropsOf<std::uint16_t, BFloat16Minimum>(images, origins, count, size, copies, crops,
                                                        threads);
    case Type::kFloat32:
      return CutCropsOf<float, FloatMinimum<float>>(images, origins, count, size, copies, crops,
                                                    threads);
    case Type::kFloat64:
      return CutCropsOf<double, FloatMinimum<double>>(images, origins, count, size, copies, crops,
                                                      threads);
  }
}

}  // namespace diffmic::cpu
