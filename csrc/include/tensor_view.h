// TensorView: an array of any library with DLPack (torch, NumPy, CuPy, JAX, ...), imported without
// a copy and validated before a kernel reads its pointer. Kernels take pointers, sizes and strides,
// and no Python objects.
//
// A view keeps the producer's memory alive. Create and destroy it with the GIL held; the pointers
// may be used without it.
#ifndef DIFFMIC_TENSOR_VIEW_H_
#define DIFFMIC_TENSOR_VIEW_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "include/dlpack_abi.h"

namespace diffmic {

enum class DType : std::uint8_t {
  kUInt8,
  kInt32,
  kInt64,
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64,
  kBool,
  kOther,  // something that no operation takes; kept so that the error can name it
};

const char* Name(DType dtype);

// Where an operation's memory has to be. In the build for the emulator of CUDA kernels the memory
// of the host stands for a GPU's.
enum class Place : std::uint8_t { kHost, kDevice };

class TensorView {
 public:
  // Reads `array` for `operation` ("rois.cut_crops") as its argument `name` ("images").
  // Raises TypeError where the object is no array that can be read, ValueError where it is on
  // another place or its capsule is damaged. A device's memory is read on the stream that is the
  // producer's current one: no other is waited for.
  static TensorView Input(pybind11::handle array, const char* operation, const char* name,
                          Place place = Place::kHost);

  // The same for memory that is written: it must be writable, compact and row-major.
  static TensorView Output(pybind11::handle array, const char* operation, const char* name,
                           Place place = Place::kHost);

  // Each check returns the view, so that an operation's demands read as one sentence.
  const TensorView& OfType(std::initializer_list<DType> allowed) const;        // TypeError
  const TensorView& OfRank(int rank, const char* layout) const;                // ValueError
  const TensorView& OfShape(std::initializer_list<std::int64_t> shape) const;  // ValueError
  const TensorView& ApartFrom(const TensorView& other) const;                  // ValueError

  const TensorView& OnDeviceOf(const TensorView& other) const;  // ValueError

  DType dtype() const { return dtype_; }
  int device() const { return device_; }  // number of the GPU, 0 on the host
  int rank() const { return static_cast<int>(shape_.size()); }
  std::int64_t size(int dim) const { return shape_[static_cast<std::size_t>(dim)]; }
  std::int64_t stride(int dim) const {
    return strides_[static_cast<std::size_t>(dim)];
  }  // elements
  std::int64_t numel() const { return numel_; }
  bool is_compact() const;

  const void* data() const { return data_; }
  void* mutable_data() const { return data_; }
  template <typename T>
  const T* data_as() const {
    return static_cast<const T*>(data_);
  }
  template <typename T>
  T* mutable_data_as() const {
    return static_cast<T*>(data_);
  }

 private:
  TensorView(const char* operation, const char* name, Place place)
      : operation_(operation), name_(name), place_(place) {}

  void Import(pybind11::handle array, bool writable);
  bool ImportCapsule(pybind11::handle array);  // both: whether the memory is read-only
  bool Adopt(dlpack::DLManagedTensorVersioned* managed);
  void Describe(const dlpack::DLTensor& tensor);
  void CheckPlace(std::int32_t type, std::int32_t id) const;
  std::string Label() const;  // "rois.cut_crops: images"
  std::string ShapeInWords() const;
  [[noreturn]] void FailValue(const std::string& rest) const;
  [[noreturn]] void FailType(const std::string& rest) const;

  const char* operation_;
  const char* name_;
  Place place_;
  int device_ = 0;
  std::shared_ptr<void> owner_;  // calls the producer's deleter once
  void* data_ = nullptr;
  const char* first_byte_ = nullptr;  // the range of memory that the elements lie in
  const char* past_last_byte_ = nullptr;
  DType dtype_ = DType::kOther;
  std::string dtype_name_;
  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  std::int64_t numel_ = 0;
};

}  // namespace diffmic

#endif  // DIFFMIC_TENSOR_VIEW_H_
