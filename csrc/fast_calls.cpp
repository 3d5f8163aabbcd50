#include "fast_calls.h"

#include "cpu/statistics.h"

namespace fastquant {
namespace {

// ------------------------------------------------------------------------------ DLPack

// The part in use of the stable ABI at https://dmlc.github.io/dlpack/latest/c_api.html.
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

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

// Set once, by set_up_fast_calls, and kept for the life of the process.
const DLPackExchangeAPI* exchange = nullptr;
PyObject* tensor_types = nullptr;
PyObject* guards = nullptr;
PyObject* is_neg = nullptr;

// Thrown where the op has to do the work; a Python error may be set, to be dropped.
struct NotPlain {};

void plain(bool holds) {
  if (!holds) throw NotPlain();
}

bool is_true(PyObject* result) {
  plain(result != nullptr);
  const int truth = PyObject_IsTrue(result);
  Py_DECREF(result);
  plain(truth >= 0);
  return truth != 0;
}

// Nothing traces, transforms or intercepts ops here.
void check_circumstances() {
  plain(exchange != nullptr);
  for (Py_ssize_t i = 0; i < PyTuple_Size(guards); ++i) {
    plain(!is_true(PyObject_CallObject(PyTuple_GetItem(guards, i), nullptr)));
  }
}

DLTensor tensor(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  bool known = false;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tensor_types); ++i) known |= PyTuple_GetItem(tensor_types, i) == type;
  plain(known);
  DLTensor t;
  plain(exchange->dltensor_from_py_object_no_sync(object, &t) == 0);
  plain(t.device_type == kCpu && t.lanes == 1 && (t.ndim == 0 || t.strides != nullptr));
  t.data = static_cast<char*>(t.data) + t.byte_offset;
  return t;
}

int64_t numel(const DLTensor& t) {
  int64_t n = 1;
  for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

Element element(const DLTensor& t) {
  if (t.code == kFloat && t.bits == 32) return Element::f32;
  if (t.code == kFloat && t.bits == 64) return Element::f64;
  if (t.code == kFloat && t.bits == 16) return Element::f16;
  if (t.code == kBfloat && t.bits == 16) return Element::bf16;
  if (t.code == kInt && t.bits == 32) return Element::i32;
  if (t.code == kInt && t.bits == 64) return Element::i64;
  return Element::other;
}

Dense observed(PyObject* object, std::optional<int64_t> ch_axis) {
  plain(!is_true(PyObject_CallFunctionObjArgs(is_neg, object, nullptr)));
  const DLTensor t = tensor(object);
  const View x = {t.data, element(t), t.ndim, t.shape, t.strides, numel(t)};
  plain(is_dense(x) && (x.numel == 0 || x.data != nullptr));
  return dense(x, ch_axis);
}

Array buffer(PyObject* object, const char* name) {
  const DLTensor t = tensor(object);
  const int64_t n = numel(t);
  plain(t.data != nullptr && n > 0 && (n == 1 || (t.ndim == 1 && t.strides[0] == 1)));
  return {t.data, element(t), n, name};
}

Array single(PyObject* object, const char* name) {
  const Array a = buffer(object, name);
  check_count(a, 1);
  return a;
}

bool flag(PyObject* object) {
  const DLTensor t = tensor(object);
  plain(t.data != nullptr && numel(t) == 1);
  const auto* bytes = static_cast<const uint8_t*>(t.data);
  return std::any_of(bytes, bytes + t.bits / 8, [](uint8_t b) { return b != 0; });
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  plain(value != -1 || PyErr_Occurred() == nullptr);
  return value;
}

std::optional<int64_t> optional_integer(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional<int64_t>(integer(object));
}

std::optional<double> optional_number(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  const double value = PyFloat_AsDouble(object);
  plain(value != -1.0 || PyErr_Occurred() == nullptr);
  return value;
}

// Lets other threads run Python while a big tensor is read.
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

// Runs f; True if it was done. Whatever is thrown is thrown before a statistic has changed.
template <class F>
PyObject* attempt(Py_ssize_t count, Py_ssize_t expected, const F& f) {
  try {
    plain(count == expected);
    check_circumstances();
    f();
    Py_RETURN_TRUE;
  } catch (...) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
}

}  // namespace

PyObject* set_up_fast_calls(PyObject*, PyObject* args) {
  PyObject *capsule, *types, *guard_functions, *is_neg_function;
  if (!PyArg_ParseTuple(args, "OO!O!O", &capsule, &PyTuple_Type, &types, &PyTuple_Type, &guard_functions,
                        &is_neg_function)) {
    return nullptr;
  }
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->major != 1 || api->dltensor_from_py_object_no_sync == nullptr) {
    return PyErr_Format(PyExc_RuntimeError, "DLPack exchange API %u.%u is none that fastquant knows",
                        api->major, api->minor);
  }
  Py_INCREF(types);
  Py_INCREF(guard_functions);
  Py_INCREF(is_neg_function);
  tensor_types = types;
  guards = guard_functions;
  is_neg = is_neg_function;
  exchange = api;
  Py_RETURN_NONE;
}

PyObject* observe_minmax_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return attempt(count, 7, [&] {
    const Dense x = observed(args[0], optional_integer(args[4]));
    const Array low = buffer(args[1], "min_val"), high = buffer(args[2], "max_val");
    const Array nonfinite_count = single(args[3], "nonfinite_count");
    const auto averaging_constant = optional_number(args[5]);
    const auto policy = static_cast<NonFinite>(integer(args[6]));
    const WithoutGil released(x.numel());
    observe_minmax(x, low, high, nonfinite_count, averaging_constant, policy);
  });
}

PyObject* observe_histogram_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return attempt(count, 7, [&] {
    const Dense x = observed(args[0], std::nullopt);
    const Array histogram = buffer(args[1], "histogram");
    const Array low = buffer(args[2], "min_val"), high = buffer(args[3], "max_val");
    const Array nonfinite_count = single(args[4], "nonfinite_count");
    const int64_t upsample_rate = integer(args[5]);
    const auto policy = static_cast<NonFinite>(integer(args[6]));
    const WithoutGil released(x.numel());
    observe_histogram(x, histogram, low, high, nonfinite_count, upsample_rate, policy);
  });
}

PyObject* observe_qparams_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return attempt(count, 15, [&] {
    if (!flag(args[1])) return;
    const Dense x = observed(args[0], optional_integer(args[8]));
    const Array low = buffer(args[2], "min_val"), high = buffer(args[3], "max_val");
    const Array scale = buffer(args[4], "scale"), zero_point = buffer(args[5], "zero_point");
    for (const Array& a : {high, scale, zero_point}) check_count(a, low.numel);
    const Array nonfinite_count = single(args[6], "nonfinite_count"), eps = single(args[7], "eps");
    const auto averaging_constant = optional_number(args[9]);
    const QParamsConfig config = {integer(args[10]), integer(args[11]), static_cast<Scheme>(integer(args[12])),
                                  integer(args[13])};
    const auto policy = static_cast<NonFinite>(integer(args[14]));
    const WithoutGil released(x.numel());
    observe_minmax(x, low, high, nonfinite_count, averaging_constant, policy);
    choose_qparams(low, high, eps, config, scale, zero_point);
  });
}

}  // namespace fastquant
