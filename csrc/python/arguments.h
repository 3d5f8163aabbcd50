// What calls that skip torch's dispatcher share: access to tensors through DLPack's C exchange API, and the
// arguments of a call.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "cpu/arrays.h"
#include "memory.h"

namespace fastquant {

// ------------------------------------------------------------------------------ DLPack

// The part of DLPack's stable ABI that is used here: https://dmlc.github.io/dlpack/latest/c_api.html.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// DLPack calls this a DLManagedTensorVersioned.
struct DLManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensor* self);
  uint64_t flags;
  DLTensor tensor;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  // Takes the tensor over, and calls its deleter when the Python object's memory is no longer used.
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensor* tensor, void** out);
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4;

// Set once, by set_up_fast_calls, and kept for the life of the process.
extern const DLPackExchangeAPI* exchange;
extern PyTypeObject* tensor_type;
extern PyTypeObject* parameter_type;

// Thrown if the fast call does not support its arguments, so that the caller must call the op. If a Python
// error is set at the same time, it is cleared.
struct NeedsOp {};

inline void require(bool holds) {
  if (!holds) throw NeedsOp();
}

// ------------------------------------------------------------------------------ arguments

// The memory of a tensor of any class.
inline DLTensor memory(PyObject* object) {
  DLTensor t;
  require(exchange->dltensor_from_py_object_no_sync(object, &t) == 0);
  require(t.device_type == kCpu && t.lanes == 1 && (t.ndim == 0 || t.strides != nullptr));
  t.data = static_cast<char*>(t.data) + t.byte_offset;
  return t;
}

inline DLTensor tensor(PyObject* object) {
  // Other subclasses may override ops or not store their values in plain memory.
  require(Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type);
  return memory(object);
}

// The stride of a dimension of size 1 is never used, so it may be anything.
inline bool has_strides(const DLTensor& t, const int64_t* strides) {
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != 1 && t.strides[d] != strides[d]) return false;
  }
  return true;
}

inline int64_t numel(const DLTensor& t) {
  int64_t n = 1;
  for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

inline Element element(const DLTensor& t) {
  if (t.code == kFloat && t.bits == 32) return Element::f32;
  if (t.code == kFloat && t.bits == 64) return Element::f64;
  if (t.code == kFloat && t.bits == 16) return Element::f16;
  if (t.code == kBfloat && t.bits == 16) return Element::bf16;
  if (t.code == kInt && t.bits == 32) return Element::i32;
  if (t.code == kInt && t.bits == 64) return Element::i64;
  return Element::other;
}

inline Dense dense(const DLTensor& t, std::optional<int64_t> ch_axis) {
  const View x = {t.data, element(t), t.ndim, t.shape, t.strides, numel(t)};
  require(is_dense(x) && (x.numel == 0 || x.data != nullptr));
  return dense(x, ch_axis);
}

inline Array buffer(const DLTensor& t, const char* name) {
  const int64_t n = numel(t);
  require(t.data != nullptr && n > 0 && (n == 1 || (t.ndim == 1 && t.strides[0] == 1)));
  require(element(t) != Element::other);
  return {t.data, element(t), n, name};
}

inline Array buffer(PyObject* object, const char* name) { return buffer(tensor(object), name); }

// The values of a contiguous tensor.
inline Array values(PyObject* object, const char* name) {
  const DLTensor t = tensor(object);
  const int64_t n = numel(t);
  require(t.data != nullptr && n > 0);
  int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0; stride *= t.shape[d--]) require(t.shape[d] == 1 || t.strides[d] == stride);
  return {t.data, element(t), n, name};
}

inline Array single(PyObject* object, const char* name) {
  const Array a = buffer(object, name);
  check_count(a, 1);
  return a;
}

inline bool flag(PyObject* object) {
  const DLTensor t = tensor(object);
  require(t.data != nullptr && numel(t) == 1);
  const auto* bytes = static_cast<const uint8_t*>(t.data);
  return std::any_of(bytes, bytes + t.bits / 8, [](uint8_t b) { return b != 0; });
}

inline int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  require(value != -1 || PyErr_Occurred() == nullptr);
  return value;
}

inline std::optional<int64_t> optional_integer(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional<int64_t>(integer(object));
}

inline double real(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  require(value != -1.0 || PyErr_Occurred() == nullptr);
  return value;
}

inline bool boolean(PyObject* object) {
  require(PyBool_Check(object));
  return object == Py_True;
}

inline std::optional<double> optional_real(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional<double>(real(object));
}

// Releases the GIL while a large tensor is processed. For a small one, that costs more than it gains.
class WithoutGil {
 public:
  explicit WithoutGil(int64_t elements) : state_(elements < kGrain ? nullptr : PyEval_SaveThread()) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Reads a call's arguments in order.
class Arguments {
 public:
  explicit Arguments(PyObject* const* next) : next_(next) {}

  PyObject* next() { return *next_++; }

 private:
  PyObject* const* next_;
};

// Returns what f does, True where that is nothing. Returns None if f throws, so that the caller calls the op
// instead, or the number of non-finite elements if NonFinite::raise rejects them. f throws before it changes
// any statistic.
template <class F>
PyObject* attempt(PyObject* const* args, Py_ssize_t count, Py_ssize_t expected, const F& f) {
  try {
    require(exchange != nullptr && count == expected);
    if constexpr (std::is_void_v<decltype(f(Arguments(args)))>) {
      f(Arguments(args));
      Py_RETURN_TRUE;
    } else {
      return f(Arguments(args));
    }
  } catch (const NonfiniteElements& refused) {
    return PyLong_FromLongLong(refused.count);
  } catch (...) {
    // KeyboardInterrupt and the like are passed on to the caller.
    if (PyErr_Occurred() != nullptr && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

}  // namespace fastquant
