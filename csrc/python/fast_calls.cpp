#include "python/fast_calls.h"

#include <utility>

#include "cpu/fake_quantize.h"
#include "cpu/huge_pages.h"
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
PyObject* empty_like = nullptr;
PyObject* empty_bytes = nullptr;

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
    plain(!is_true(PyObject_CallNoArgs(PyTuple_GetItem(guards, i))));
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

// Sizes of 1 have any stride.
bool has_strides(const DLTensor& t, const int64_t* strides) {
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != 1 && t.strides[d] != strides[d]) return false;
  }
  return true;
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

// A tensor that may come from anywhere: its memory might hold the negatives of its values.
DLTensor unnegated(PyObject* object) {
  const DLTensor t = tensor(object);
  plain(!is_true(PyObject_CallFunctionObjArgs(is_neg, object, nullptr)));
  return t;
}

Dense dense(const DLTensor& t, std::optional<int64_t> ch_axis) {
  const View x = {t.data, element(t), t.ndim, t.shape, t.strides, numel(t)};
  plain(is_dense(x) && (x.numel == 0 || x.data != nullptr));
  return dense(x, ch_axis);
}

Array buffer(const DLTensor& t, const char* name) {
  const int64_t n = numel(t);
  plain(t.data != nullptr && n > 0 && (n == 1 || (t.ndim == 1 && t.strides[0] == 1)));
  plain(element(t) != Element::other);
  return {t.data, element(t), n, name};
}

Array buffer(PyObject* object, const char* name) { return buffer(tensor(object), name); }

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

class Owned {
 public:
  // Of a new reference, or none where a call failed.
  explicit Owned(PyObject* object) : object_(object) { plain(object != nullptr); }
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// A new tensor laid out as another one is.
class Output {
 public:
  Output(PyObject* like, const DLTensor& t) : object_(PyObject_CallFunctionObjArgs(empty_like, like, nullptr)) {
    const DLTensor made = tensor(object_.get());
    plain(made.ndim == t.ndim && std::equal(t.shape, t.shape + t.ndim, made.shape) &&
          element(made) == element(t) && has_strides(made, t.strides));
    data_ = made.data;
    prefer_huge_pages(data_, numel(t) * (t.bits / 8));
  }

  void* data() const { return data_; }
  PyObject* release() { return object_.release(); }

 private:
  Owned object_;
  void* data_;
};

// Room for the mask of n elements, where one is wanted.
class Mask {
 public:
  Mask(bool wanted, int64_t n) {
    if (!wanted) return;
    const Owned bytes(PyLong_FromLongLong(mask_words(n) * 8));
    object_.emplace(PyObject_CallFunctionObjArgs(empty_bytes, bytes.get(), nullptr));
    words_ = static_cast<uint64_t*>(tensor(object_->get()).data);
  }

  uint64_t* words() const { return words_; }

  // y, alone or with its mask.
  PyObject* with(Output* y) const {
    if (!object_.has_value()) return y->release();
    const Owned result(y->release());
    return PyTuple_Pack(2, result.get(), object_->get());
  }

 private:
  std::optional<Owned> object_;
  uint64_t* words_ = nullptr;
};

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

// One argument after the other.
class Arguments {
 public:
  explicit Arguments(PyObject* const* next) : next_(next) {}

  PyObject* next() { return *next_++; }

 private:
  PyObject* const* next_;
};

QParamsConfig config(Arguments* args) {
  const int64_t quant_min = integer(args->next()), quant_max = integer(args->next());
  const auto scheme = static_cast<Scheme>(integer(args->next()));
  return {quant_min, quant_max, scheme, integer(args->next())};
}

// What f returns; None where it has to be left to the op. Whatever is thrown is thrown before a
// statistic has changed.
template <class F>
PyObject* attempt(PyObject* const* args, Py_ssize_t count, Py_ssize_t expected, const F& f) {
  try {
    plain(count == expected);
    check_circumstances();
    return f(Arguments(args));
  } catch (...) {
    // Interruptions are not ours to drop.
    if (PyErr_Occurred() != nullptr && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

}  // namespace

PyObject* set_up_fast_calls(PyObject*, PyObject* args) {
  PyObject *capsule, *types, *guard_functions, *functions[3];
  if (!PyArg_ParseTuple(args, "OO!O!OOO", &capsule, &PyTuple_Type, &types, &PyTuple_Type, &guard_functions,
                        &functions[0], &functions[1], &functions[2])) {
    return nullptr;
  }
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->major != 1 || api->dltensor_from_py_object_no_sync == nullptr) {
    return PyErr_Format(PyExc_RuntimeError, "DLPack exchange API %u.%u is none that fastquant knows",
                        api->major, api->minor);
  }
  tensor_types = Py_NewRef(types);
  guards = Py_NewRef(guard_functions);
  is_neg = Py_NewRef(functions[0]);
  empty_like = Py_NewRef(functions[1]);
  empty_bytes = Py_NewRef(functions[2]);
  exchange = api;
  Py_RETURN_NONE;
}

PyObject* observe_minmax_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 7, [](Arguments args) {
    PyObject* const observed = args.next();
    const Array low = buffer(args.next(), "min_val"), high = buffer(args.next(), "max_val");
    const Array nonfinite_count = single(args.next(), "nonfinite_count");
    const Dense x = dense(unnegated(observed), optional_integer(args.next()));
    const auto averaging_constant = optional_number(args.next());
    const auto policy = static_cast<NonFinite>(integer(args.next()));
    const WithoutGil released(x.numel());
    observe_minmax(x, low, high, nonfinite_count, averaging_constant, policy);
    return Py_NewRef(Py_True);
  });
}

PyObject* observe_histogram_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 8, [](Arguments args) {
    const Dense x = dense(unnegated(args.next()), std::nullopt);
    const Array histogram = buffer(args.next(), "histogram");
    const Array low = buffer(args.next(), "min_val"), high = buffer(args.next(), "max_val");
    const Array nonfinite_count = single(args.next(), "nonfinite_count");
    const int64_t upsample_rate = integer(args.next());
    const auto policy = static_cast<NonFinite>(integer(args.next()));
    const int64_t times = integer(args.next());
    const WithoutGil released(x.numel());
    observe_histogram(x, histogram, low, high, nonfinite_count, upsample_rate, policy, times);
    return Py_NewRef(Py_True);
  });
}

PyObject* histogram_qparams_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 11, [](Arguments args) {
    const Array histogram = buffer(args.next(), "histogram");
    const Array low = single(args.next(), "min_val"), high = single(args.next(), "max_val");
    const Array eps = single(args.next(), "eps");
    const int64_t levels = integer(args.next());
    const QParamsConfig chosen = config(&args);
    const Array scale = single(args.next(), "scale"), zero_point = single(args.next(), "zero_point");
    double found[2];  // in the type of the buffers, whichever it is
    const Array new_min = {&found[0], low.type, 1, "new_min"}, new_max = {&found[1], high.type, 1, "new_max"};
    search_histogram_range(histogram, low, high, levels, new_min, new_max);
    choose_qparams(new_min, new_max, eps, chosen, scale, zero_point);
    return Py_NewRef(Py_True);
  });
}

PyObject* fake_quantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 8, [](Arguments args) {
    PyObject* const object = args.next();
    const DLTensor t = unnegated(object);
    const Array scale = buffer(unnegated(args.next()), "scale");
    const Array zero_point = buffer(unnegated(args.next()), "zero_point");
    PyObject* const enabled = args.next();
    if (enabled != Py_None && !flag(enabled)) return Py_NewRef(object);
    const Dense x = dense(t, optional_integer(args.next()));
    const int64_t quant_min = integer(args.next()), quant_max = integer(args.next());
    Output y(object, t);
    const Mask mask(args.next() == Py_True, x.numel());
    {
      const WithoutGil released(x.numel());
      fake_quantize(x, scale, zero_point, quant_min, quant_max, y.data(), mask.words());
    }
    return mask.with(&y);
  });
}

PyObject* observe_fake_quantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 17, [](Arguments args) {
    PyObject* const object = args.next();
    const DLTensor t = unnegated(object);
    const bool observes = flag(args.next()), quantizes = flag(args.next());
    const Array low = buffer(args.next(), "min_val"), high = buffer(args.next(), "max_val");
    const Array scale = buffer(args.next(), "scale"), zero_point = buffer(args.next(), "zero_point");
    for (const Array& a : {high, scale, zero_point}) check_count(a, low.numel);
    const Array nonfinite_count = single(args.next(), "nonfinite_count"), eps = single(args.next(), "eps");
    const Dense x = dense(t, optional_integer(args.next()));
    const auto averaging_constant = optional_number(args.next());
    const QParamsConfig chosen = config(&args);
    const auto policy = static_cast<NonFinite>(integer(args.next()));
    std::optional<Output> y;
    if (quantizes) y.emplace(object, t);
    const Mask mask(quantizes && args.next() == Py_True, x.numel());
    {
      const WithoutGil released(x.numel());
      if (observes) {
        observe_minmax(x, low, high, nonfinite_count, averaging_constant, policy);
        choose_qparams(low, high, eps, chosen, scale, zero_point);
      }
      if (quantizes) {
        fake_quantize(x, scale, zero_point, chosen.quant_min, chosen.quant_max, y->data(), mask.words());
      }
    }
    return quantizes ? mask.with(&*y) : Py_NewRef(object);
  });
}

PyObject* mask_gradient_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    PyObject* const object = args.next();
    const DLTensor t = unnegated(object), mask = tensor(args.next());
    PyObject* const stride = args.next();
    int64_t strides[kMaxDims];
    plain(PyTuple_Check(stride) && PyTuple_Size(stride) == t.ndim && t.ndim <= kMaxDims);
    for (int d = 0; d < t.ndim; ++d) strides[d] = integer(PyTuple_GetItem(stride, d));
    plain(has_strides(t, strides));
    const Dense grad = dense(t, std::nullopt);
    plain(numel(mask) == mask_words(grad.numel()) * 8 && mask.ndim == 1 && mask.strides[0] == 1 &&
          reinterpret_cast<uintptr_t>(mask.data) % sizeof(uint64_t) == 0);
    Output out(object, t);
    {
      const WithoutGil released(grad.numel());
      mask_gradient(grad, static_cast<const uint64_t*>(mask.data), out.data());
    }
    return out.release();
  });
}

}  // namespace fastquant
