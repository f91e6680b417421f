#include "include/tensor_view.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <iterator>

#include "include/text.h"
#if DIFFMIC_EMULATED
#include "emulator/memory.h"
#endif

namespace py = pybind11;

namespace diffmic {
namespace {

using dlpack::DLDevice;
using dlpack::DLManagedTensor;
using dlpack::DLManagedTensorVersioned;
using dlpack::DLTensor;

constexpr char kVersioned[] = "dltensor_versioned";
constexpr char kUsedVersioned[] = "used_dltensor_versioned";
constexpr char kLegacy[] = "dltensor";
constexpr char kUsedLegacy[] = "used_dltensor";
constexpr char kExchange[] = "dlpack_exchange_api";

std::string Joined(const std::int64_t* values, std::size_t count) {
  std::ostringstream text;
  text << "(";
  for (std::size_t i = 0; i < count; ++i) text << (i ? ", " : "") << values[i];
  text << (count == 1 ? ",)" : ")");
  return text.str();
}

std::string DeviceInWords(std::int32_t type, std::int32_t id) {
  switch (type) {
    case dlpack::kDLCPU:
      return "the CPU";
    case dlpack::kDLCUDA:
    case dlpack::kDLCUDAManaged:
      return Text("cuda:", id);
    case dlpack::kDLROCM:
      return Text("rocm:", id);
    case dlpack::kDLMetal:
      return Text("metal:", id);
    default:
      return Text("DLPack device type ", type);
  }
}

// Page-locked host memory is ordinary memory to a CPU kernel.
bool IsHost(std::int32_t type) {
  return type == dlpack::kDLCPU || type == dlpack::kDLCUDAHost || type == dlpack::kDLROCMHost;
}

// The memory of a GPU, or the host's in its place where kernels are emulated.
bool IsDevice(std::int32_t type) {
#if DIFFMIC_EMULATED
  return type == dlpack::kDLCPU;
#else
  return type == dlpack::kDLCUDA || type == dlpack::kDLCUDAManaged;
#endif
}

DType Classify(const dlpack::DLDataType& type) {
  if (type.lanes != 1) return DType::kOther;
  switch (type.code) {
    case dlpack::kDLUInt:
      return type.bits == 8 ? DType::kUInt8 : DType::kOther;
    case dlpack::kDLInt:
      return type.bits == 32 ? DType::kInt32 : type.bits == 64 ? DType::kInt64 : DType::kOther;
    case dlpack::kDLFloat:
      return type.bits == 16   ? DType::kFloat16
             : type.bits == 32 ? DType::kFloat32
             : type.bits == 64 ? DType::kFloat64
                               : DType::kOther;
    case dlpack::kDLBfloat:
      return type.bits == 16 ? DType::kBFloat16 : DType::kOther;
    case dlpack::kDLBool:
      return type.bits == 8 ? DType::kBool : DType::kOther;
    default:
      return DType::kOther;
  }
}

std::string DTypeInWords(const dlpack::DLDataType& type) {
  static constexpr const char* kKinds[] = {"int",    "uint",    "float", "opaque",
                                           "bfloat", "complex", "bool"};
  std::ostringstream text;
  if (type.code < std::size(kKinds)) {
    text << kKinds[type.code];
  } else {
    text << "DLPack type code " << int{type.code} << " of bits ";
  }
  if (type.code != dlpack::kDLBool) text << int{type.bits};
  if (type.lanes != 1) text << " in vectors of " << type.lanes << " lanes";
  return text.str();
}

template <typename Managed>
std::shared_ptr<void> Own(Managed* managed) {
  return {managed, [](void* pointer) {
            auto* tensor = static_cast<Managed*>(pointer);
            if (tensor->deleter != nullptr) tensor->deleter(tensor);
          }};
}

// The capsule is renamed at the moment its content changes hands, which tells the capsule's own
// destructor to leave the deleter to us: from here on it runs exactly once, whatever fails next.
template <typename Managed>
Managed* Take(py::handle capsule, const char* name, const char* used_name) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (managed == nullptr || PyCapsule_SetName(capsule.ptr(), used_name) != 0) {
    throw py::error_already_set();
  }
  return managed;
}

py::object AskForCapsule(py::handle array, bool device) {
  const py::object method = array.attr("__dlpack__");
  try {
    if (device)
      return method(py::arg("stream") = -1, py::arg("max_version") = py::make_tuple(1, 0));
    return method(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    // Producers of the first protocol do not know the keyword.
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return device ? method(py::arg("stream") = -1) : method();
}

// The exchange table that exactly this type offers, else NULL. A subclass inherits the attribute,
// and may mean something else by its memory: it is asked through its own __dlpack__.
const dlpack::DLPackExchangeAPI* ExchangeOf(py::handle array) {
  PyTypeObject* type = Py_TYPE(array.ptr());
  static PyObject* const kAttribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* capsule =
      type->tp_dict != nullptr ? PyDict_GetItemWithError(type->tp_dict, kAttribute) : nullptr;
  if (capsule == nullptr || !PyCapsule_IsValid(capsule, kExchange)) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<dlpack::DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, kExchange));
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->older;
  return api;
}

// torch's table exports a tensor that requires gradients without a word, its __dlpack__ refuses.
bool RequiresGrad(py::handle array) {
  return py::getattr(array, "requires_grad", py::bool_(false)).ptr() == Py_True;
}

}  // namespace

const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return "uint8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBool:
      return "bool";
    case DType::kOther:
      break;
  }
  return "another type";
}

TensorView TensorView::Input(py::handle array, const char* operation, const char* name,
                             Place place) {
  TensorView view(operation, name, place);
  view.Import(array, /*writable=*/false);
  return view;
}

TensorView TensorView::Output(py::handle array, const char* operation, const char* name,
                              Place place) {
  TensorView view(operation, name, place);
  view.Import(array, /*writable=*/true);
  if (!view.is_compact()) {
    view.FailValue(Text("must be compact and row-major, got shape ", view.ShapeInWords(),
                        " with strides ", Joined(view.strides_.data(), view.strides_.size())));
  }
  return view;
}

void TensorView::Import(py::handle array, bool writable) {
  if (!py::hasattr(array, "__dlpack__") || !py::hasattr(array, "__dlpack_device__")) {
    FailType(
        Text("must be an array that can be read through DLPack (torch, NumPy >= 1.23, ...), got ",
             py::str(py::type::handle_of(array).attr("__name__")).cast<std::string>()));
  }
  // torch exports a tensor whose negation is pending as if it were not (is_neg).
  if (py::hasattr(array, "is_neg") && array.attr("is_neg")().cast<bool>()) {
    FailValue(
        "is a lazily negated view, whose memory holds the opposite sign: pass "
        "resolve_neg() of it");
  }
  bool read_only = false;
  try {
    if (const auto* exchange = ExchangeOf(array); exchange != nullptr && !RequiresGrad(array)) {
      dlpack::DLManagedTensorVersioned* managed = nullptr;
      if (exchange->managed_tensor_from_py_object(array.ptr(), &managed) != 0) {
        throw py::error_already_set();
      }
      read_only = Adopt(managed);
    } else {
      read_only = ImportCapsule(array);
    }
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // an interrupt is not a property of the array
    const std::string message = Text(
        Label(), " cannot be read through DLPack: ", py::str(error.value()).cast<std::string>());
    py::raise_from(error, PyExc_ValueError, message.c_str());
    throw py::error_already_set();
  }
  if (writable && read_only) FailValue("is read-only memory, and the operation writes to it");
#if DIFFMIC_EMULATED
  // What kernels may touch, and whether they may write there.
  if (place_ == Place::kDevice)
    emulator::Register(owner_, name_, first_byte_, past_last_byte_, writable);
#endif
}

bool TensorView::ImportCapsule(py::handle array) {
  // The device comes first: asking for the capsule of another device's array may wait for it.
  const auto device = array.attr("__dlpack_device__")().cast<py::tuple>();
  const auto type = py::int_(device[0]).cast<std::int32_t>();
  const auto id = py::int_(device[1]).cast<std::int32_t>();
  CheckPlace(type, id);
  const py::object capsule = AskForCapsule(array, place_ == Place::kDevice);
  if (PyCapsule_IsValid(capsule.ptr(), kVersioned)) {
    return Adopt(Take<DLManagedTensorVersioned>(capsule, kVersioned, kUsedVersioned));
  }
  if (!PyCapsule_IsValid(capsule.ptr(), kLegacy)) {
    FailValue("gave no DLPack capsule that is still unused");
  }
  auto* managed = Take<DLManagedTensor>(capsule, kLegacy, kUsedLegacy);
  owner_ = Own(managed);
  Describe(managed->dl_tensor);
  return false;  // the first protocol cannot say
}

bool TensorView::Adopt(DLManagedTensorVersioned* managed) {
  owner_ = Own(managed);
  if (managed->version.major != dlpack::kMajorVersion) {
    // Only the version and the deleter keep their place in another major version.
    FailValue(Text("comes in DLPack version ", managed->version.major, ".", managed->version.minor,
                   ", version 1 was asked for"));
  }
  Describe(managed->dl_tensor);
  return (managed->flags & dlpack::kFlagReadOnly) != 0;
}

void TensorView::Describe(const DLTensor& tensor) {
  CheckPlace(tensor.device.device_type, tensor.device.device_id);
  device_ = place_ == Place::kDevice ? tensor.device.device_id : 0;
  dtype_ = Classify(tensor.dtype);
  dtype_name_ = DTypeInWords(tensor.dtype);
  if (tensor.ndim < 0 || (tensor.ndim > 0 && tensor.shape == nullptr)) {
    FailValue("comes with a damaged DLPack description: no shape");
  }
  const auto rank = static_cast<std::size_t>(tensor.ndim);
  shape_.assign(tensor.shape, tensor.shape + rank);

  // Everything that is later multiplied without a check is bounded here: the elements and the bytes
  // they reach over fit an int64.
  bool fits = true;
  bool empty = false;
  std::int64_t numel = 1;
  for (const std::int64_t extent : shape_) {
    if (extent < 0) FailValue(Text("comes with a negative size: ", ShapeInWords()));
    empty = empty || extent == 0;
  }
  for (const std::int64_t extent : shape_) {
    fits = fits && (empty || !__builtin_mul_overflow(numel, extent, &numel));
  }
  numel_ = empty ? 0 : numel;
  if (tensor.strides != nullptr) {
    strides_.assign(tensor.strides, tensor.strides + rank);
  } else {
    strides_.assign(rank, 1);
    for (std::size_t dim = rank; !empty && fits && dim-- > 1;) {
      strides_[dim - 1] = strides_[dim] * shape_[dim];
    }
  }
  if (empty) return;  // no element is ever reached: neither pointer nor strides mean anything

  const std::int64_t item = (tensor.dtype.bits * tensor.dtype.lanes + 7) / 8;
  std::int64_t lowest = 0;
  std::int64_t highest = 0;
  for (std::size_t dim = 0; dim < rank; ++dim) {
    std::int64_t reach = 0;
    fits = fits && !__builtin_mul_overflow(strides_[dim], shape_[dim] - 1, &reach);
    std::int64_t& end = reach < 0 ? lowest : highest;
    fits = fits && !__builtin_add_overflow(end, reach, &end);
  }
  fits = fits && !__builtin_add_overflow(highest, 1, &highest) &&
         !__builtin_mul_overflow(lowest, item, &lowest) &&
         !__builtin_mul_overflow(highest, item, &highest);
  if (!fits) {
    FailValue(Text("reaches over more memory than an address can name: shape ", ShapeInWords(),
                   ", strides ", Joined(strides_.data(), strides_.size())));
  }
  if (tensor.data == nullptr) FailValue("comes without memory: its data pointer is NULL");
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  first_byte_ = static_cast<const char*>(data_) + lowest;
  past_last_byte_ = static_cast<const char*>(data_) + highest;
  if (dtype_ != DType::kOther && reinterpret_cast<std::uintptr_t>(data_) % item != 0) {
    FailValue(Text("must start at a multiple of its element size, ", item,
                   " bytes, and does not: pass a copy of it"));
  }
}

void TensorView::CheckPlace(std::int32_t type, std::int32_t id) const {
  if (place_ == Place::kHost ? IsHost(type) : IsDevice(type)) return;
  FailValue(Text("must be on ", place_ == Place::kHost ? "the CPU" : "a CUDA device", ", got ",
                 DeviceInWords(type, id)));
}

const TensorView& TensorView::OfType(std::initializer_list<DType> allowed) const {
  std::string names;
  std::size_t left = allowed.size();
  for (const DType type : allowed) {
    if (dtype_ == type) return *this;
    names += Name(type);
    if (--left) names += left == 1 ? " or " : ", ";
  }
  FailType(Text("must be ", names, ", got ", dtype_name_));
}

const TensorView& TensorView::OfRank(int wanted, const char* layout) const {
  if (rank() != wanted) FailValue(Text("must be ", layout, ", got ", ShapeInWords()));
  return *this;
}

const TensorView& TensorView::OfShape(std::initializer_list<std::int64_t> shape) const {
  if (!std::equal(shape.begin(), shape.end(), shape_.begin(), shape_.end())) {
    FailValue(
        Text("must have shape ", Joined(std::data(shape), shape.size()), ", got ", ShapeInWords()));
  }
  return *this;
}

const TensorView& TensorView::ApartFrom(const TensorView& other) const {
  const std::less<const char*> before;  // a total order, also between unrelated arrays
  if (before(first_byte_, other.past_last_byte_) && before(other.first_byte_, past_last_byte_)) {
    FailValue(Text("must not share memory with ", other.name_));
  }
  return *this;
}

const TensorView& TensorView::OnDeviceOf(const TensorView& other) const {
  if (device_ != other.device_) {
    FailValue(Text("must be on the device of ", other.name_, ", cuda:", other.device_,
                   ", got cuda:", device_));
  }
  return *this;
}

bool TensorView::is_compact() const {
  std::int64_t expected = 1;
  for (int dim = rank(); numel_ > 0 && dim-- > 0;) {
    if (size(dim) != 1 && stride(dim) != expected) return false;
    expected *= size(dim);
  }
  return true;
}

std::string TensorView::Label() const { return Text(operation_, ": ", name_); }

std::string TensorView::ShapeInWords() const { return Joined(shape_.data(), shape_.size()); }

void TensorView::FailValue(const std::string& rest) const {
  throw py::value_error(Text(Label(), " ", rest));
}

void TensorView::FailType(const std::string& rest) const {
  throw py::type_error(Text(Label(), " ", rest));
}

}  // namespace diffmic
