// Binding of `image_ids`, for CUDA; on the CPU it is Python's hashlib.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#if DIFFMIC_WITH_CUDA
#include "bindings/cuda_launch.h"
#include "cuda/image_ids/image_ids.h"

namespace py = pybind11;

namespace diffmic::cuda {
namespace {

void ImageIds(py::handle images_array, py::handle keys_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "image_ids";
  Arrays arrays(kOperation, Place::kDevice);
  const TensorView& view =
      arrays.Input(images_array, "images", {DType::kFloat32}).OfRank(2, "[B, pixels]");
  const std::int64_t images = view.size(0), pixels = view.size(1);
  if (pixels < 1 || images > std::numeric_limits<std::int32_t>::max()) {
    arrays.Fail("images",
                Text("must have pixels, and less than 2^31 rows, got (", images, ", ", pixels, ")")
                    .c_str());
  }
  const float* data = arrays.Contiguous<float>(images_array, "images", {images, pixels});
  auto* keys = arrays.Output<std::int64_t>(keys_array, "keys", {images});
  const Launch launch(arrays, stream);
  launch([&](cudaStream_t on) { HashImages(data, images, pixels, keys, on); });
}

}  // namespace

void BindImageIds(py::module_& m) {
  using py::arg;
  m.def("image_ids", &ImageIds, arg("images"), arg("keys"), arg("stream"),
        "Writes the 64-bit BLAKE2b hash of each row of images [B, pixels] float32 to keys [B].");
}

}  // namespace diffmic::cuda
#endif
