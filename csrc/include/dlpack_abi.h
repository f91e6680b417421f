// The memory layout of DLPack, the exchange format of array libraries: the part of its public ABI
// (version 1, and the unversioned layout before it) that an importer of arrays needs.
//
// Restated from the specification of DLPack, https://dmlc.github.io/dlpack/latest/c_api.html;
// DLPack is Copyright (c) 2017 by its contributors, Apache License 2.0. Names and field order are
// DLPack's, because producers fill these very bytes.
#ifndef DIFFMIC_DLPACK_ABI_H_
#define DIFFMIC_DLPACK_ABI_H_

#include <cstddef>
#include <cstdint>

namespace diffmic::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;

// The enumerations are plain integers here: a producer may send a value that is newer than this
// file, and an enumeration could not hold it.
inline constexpr std::int32_t kDLCPU = 1;
inline constexpr std::int32_t kDLCUDA = 2;
inline constexpr std::int32_t kDLCUDAHost = 3;
inline constexpr std::int32_t kDLMetal = 8;
inline constexpr std::int32_t kDLROCM = 10;
inline constexpr std::int32_t kDLROCMHost = 11;
inline constexpr std::int32_t kDLCUDAManaged = 13;

inline constexpr std::uint8_t kDLInt = 0;
inline constexpr std::uint8_t kDLUInt = 1;
inline constexpr std::uint8_t kDLFloat = 2;
inline constexpr std::uint8_t kDLBfloat = 4;
inline constexpr std::uint8_t kDLComplex = 5;
inline constexpr std::uint8_t kDLBool = 6;

inline constexpr std::uint64_t kFlagReadOnly = 1;

struct DLPackVersion {
  std::uint32_t major;
  std::uint32_t minor;
};

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; NULL means compact row-major (allowed before version 1.2)
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);  // may be NULL
};

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);  // may be NULL
  std::uint64_t flags;
  DLTensor dl_tensor;
};

// The table of C functions that a type offers as `__dlpack_c_exchange_api__` (DLPack 1.2): the same
// exchange without a Python call. It may grow at its end; what is not used here is not spelt out.
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* older;  // of an earlier major version, or NULL
  void (*allocate)();
  // 0, or -1 with a Python exception set; the caller owns what comes out.
  int (*managed_tensor_from_py_object)(void* array, DLManagedTensorVersioned** out);
};

static_assert(sizeof(void*) != 8 || sizeof(DLTensor) == 48);
static_assert(sizeof(void*) != 8 || sizeof(DLManagedTensor) == 64);
static_assert(sizeof(void*) != 8 || sizeof(DLManagedTensorVersioned) == 80);

}  // namespace diffmic::dlpack

#endif  // DIFFMIC_DLPACK_ABI_H_
