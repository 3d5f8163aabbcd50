#include "python/fast_calls.h"

#include "cpu/batch_norm.h"
#include "cpu/clamped_sum.h"
#include "cpu/fake_quantize.h"
#include "cpu/folded_weight.h"
#include "cpu/huge_pages.h"
#include "cpu/ranges.h"
#include "cpu/statistics.h"

namespace fastquant {
namespace {

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
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;

// Thrown if the fast call does not support its arguments, so that the caller must call the op. If a Python
// error is set at the same time, it is cleared.
struct NeedsOp {};

void require(bool holds) {
  if (!holds) throw NeedsOp();
}

// ------------------------------------------------------------------------------ arguments

DLTensor tensor(PyObject* object) {
  // Other subclasses may override ops or not store their values in plain memory.
  require(Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type);
  DLTensor t;
  require(exchange->dltensor_from_py_object_no_sync(object, &t) == 0);
  require(t.device_type == kCpu && t.lanes == 1 && (t.ndim == 0 || t.strides != nullptr));
  t.data = static_cast<char*>(t.data) + t.byte_offset;
  return t;
}

// The stride of a dimension of size 1 is never used, so it may be anything.
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

Dense dense(const DLTensor& t, std::optional<int64_t> ch_axis) {
  const View x = {t.data, element(t), t.ndim, t.shape, t.strides, numel(t)};
  require(is_dense(x) && (x.numel == 0 || x.data != nullptr));
  return dense(x, ch_axis);
}

Array buffer(const DLTensor& t, const char* name) {
  const int64_t n = numel(t);
  require(t.data != nullptr && n > 0 && (n == 1 || (t.ndim == 1 && t.strides[0] == 1)));
  require(element(t) != Element::other);
  return {t.data, element(t), n, name};
}

Array buffer(PyObject* object, const char* name) { return buffer(tensor(object), name); }

// The values of a contiguous tensor.
Array values(PyObject* object, const char* name) {
  const DLTensor t = tensor(object);
  const int64_t n = numel(t);
  require(t.data != nullptr && n > 0);
  int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0; stride *= t.shape[d--]) require(t.shape[d] == 1 || t.strides[d] == stride);
  return {t.data, element(t), n, name};
}

Array single(PyObject* object, const char* name) {
  const Array a = buffer(object, name);
  check_count(a, 1);
  return a;
}

bool flag(PyObject* object) {
  const DLTensor t = tensor(object);
  require(t.data != nullptr && numel(t) == 1);
  const auto* bytes = static_cast<const uint8_t*>(t.data);
  return std::any_of(bytes, bytes + t.bits / 8, [](uint8_t b) { return b != 0; });
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  require(value != -1 || PyErr_Occurred() == nullptr);
  return value;
}

std::optional<int64_t> optional_integer(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional<int64_t>(integer(object));
}

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  require(value != -1.0 || PyErr_Occurred() == nullptr);
  return value;
}

bool boolean(PyObject* object) {
  require(PyBool_Check(object));
  return object == Py_True;
}

std::optional<double> optional_number(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional<double>(number(object));
}

// Whether a tensor has the shape, strides and dtype of x.
bool lies_as(const DLTensor& y, const DLTensor& x) {
  return y.ndim == x.ndim && std::equal(x.shape, x.shape + x.ndim, y.shape) && has_strides(y, x.strides);
}

bool is_like(const DLTensor& y, const DLTensor& x) { return lies_as(y, x) && element(y) == element(x); }

// A weight with its output channels as channels.
Dense output_channels(const DLTensor& weight) {
  require(weight.ndim >= 2);
  return dense(weight, 0);
}

// A tensor of any dtype that lies in memory as a weight does.
Array aligned_with_weight(PyObject* object, const DLTensor& weight, const char* name) {
  const DLTensor t = tensor(object);
  require(lies_as(t, weight));
  return {t.data, element(t), numel(t), name};
}

// The memory of an output tensor for x.
void* output(PyObject* object, const DLTensor& x) {
  const DLTensor y = tensor(object);
  require(is_like(y, x));
  prefer_huge_pages(y.data, numel(x) * (x.bits / 8));
  return y.data;
}

// The memory of a mask for n elements, or null if `object` is None.
uint64_t* mask_words_in(PyObject* object, int64_t n) {
  if (object == Py_None) return nullptr;
  const DLTensor mask = tensor(object);
  require(mask.bits == 8 && numel(mask) == mask_words(n) * 8 && mask.ndim == 1 && mask.strides[0] == 1 &&
          reinterpret_cast<uintptr_t>(mask.data) % sizeof(uint64_t) == 0);
  return static_cast<uint64_t*>(mask.data);
}

// A tensor whose axis 1 has the channels.
Dense batch_norm_input(const DLTensor& t) {
  require(2 <= t.ndim && t.ndim <= 5 && numel(t) > 0);
  return dense(t, 1);
}

// The type of arithmetic on elements of a floating type.
Element compute_type(Element stored) { return stored == Element::f64 ? Element::f64 : Element::f32; }

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

QParamsConfig qparams_config(Arguments* args) {
  const int64_t quant_min = integer(args->next()), quant_max = integer(args->next());
  const auto scheme = static_cast<Scheme>(integer(args->next()));
  return {quant_min, quant_max, scheme, integer(args->next())};
}

// The fields of the NamedTuple FusedSettings in fastquant/_native/settings.py.
struct FusedSettings {
  explicit FusedSettings(PyObject* settings) {
    PyObject* field[kFields];
    require(PyTuple_Check(settings) && PyTuple_Size(settings) == kFields);
    for (int i = 0; i < kFields; ++i) field[i] = PyTuple_GetItem(settings, i);
    Arguments fields(field);
    observes = flag(fields.next());
    fake_quant_enabled = fields.next();
    buffers.min_val = buffer(fields.next(), "min_val"), buffers.max_val = buffer(fields.next(), "max_val");
    buffers.scale = buffer(fields.next(), "scale"), buffers.zero_point = buffer(fields.next(), "zero_point");
    buffers.nonfinite_count = single(fields.next(), "nonfinite_count");
    buffers.eps = single(fields.next(), "eps");
    observe.ch_axis = optional_integer(fields.next());
    observe.averaging_constant = optional_number(fields.next());
    observe.qparams = qparams_config(&fields);
    observe.nonfinite = static_cast<NonFinite>(integer(fields.next()));
  }

  static constexpr int kFields = 15;
  bool observes;
  PyObject* fake_quant_enabled;
  FusedBuffers buffers;
  ObserveSettings observe;
};

// Runs f and returns True. Returns None if f throws, so that the caller calls the op instead, or the number of
// non-finite elements if NonFinite::raise rejects them. f throws before it changes any statistic.
template <class F>
PyObject* attempt(PyObject* const* args, Py_ssize_t count, Py_ssize_t expected, const F& f) {
  try {
    require(exchange != nullptr && count == expected);
    f(Arguments(args));
    Py_RETURN_TRUE;
  } catch (const NonfiniteElements& refused) {
    return PyLong_FromLongLong(refused.count);
  } catch (...) {
    // KeyboardInterrupt and the like are passed on to the caller.
    if (PyErr_Occurred() != nullptr && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

}  // namespace

PyObject* set_up_fast_calls(PyObject*, PyObject* args) {
  PyObject *capsule, *tensor, *parameter;
  if (!PyArg_ParseTuple(args, "OO!O!", &capsule, &PyType_Type, &tensor, &PyType_Type, &parameter))
    return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->major != 1 || api->dltensor_from_py_object_no_sync == nullptr) {
    return PyErr_Format(PyExc_RuntimeError, "DLPack exchange API %u.%u is none that fastquant knows",
                        api->major, api->minor);
  }
  tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor));
  parameter_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(parameter));
  exchange = api;
  Py_RETURN_NONE;
}

PyObject* is_on_call(PyObject*, PyObject* object) {
  try {
    require(exchange != nullptr);
    return PyBool_FromLong(flag(object));
  } catch (const NeedsOp&) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

PyObject* observe_minmax_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 7, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    const Array low = buffer(args.next(), "min_val"), high = buffer(args.next(), "max_val");
    const Array nonfinite_count = single(args.next(), "nonfinite_count");
    const Dense x = dense(t, optional_integer(args.next()));
    const auto averaging_constant = optional_number(args.next());
    const auto policy = static_cast<NonFinite>(integer(args.next()));
    const WithoutGil released(x.numel());
    observe_minmax(x, low, high, nonfinite_count, averaging_constant, policy);
  });
}

PyObject* observe_histogram_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 8, [](Arguments args) {
    const Dense x = dense(tensor(args.next()), std::nullopt);
    const Array histogram = buffer(args.next(), "histogram");
    const Array low = buffer(args.next(), "min_val"), high = buffer(args.next(), "max_val");
    const Array nonfinite_count = single(args.next(), "nonfinite_count");
    const int64_t upsample_rate = integer(args.next());
    const auto policy = static_cast<NonFinite>(integer(args.next()));
    const int64_t times = integer(args.next());
    const WithoutGil released(x.numel());
    observe_histogram(x, histogram, low, high, nonfinite_count, upsample_rate, policy, times);
  });
}

PyObject* histogram_qparams_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 11, [](Arguments args) {
    const Array histogram = buffer(args.next(), "histogram");
    const Array low = single(args.next(), "min_val"), high = single(args.next(), "max_val");
    const Array eps = single(args.next(), "eps");
    const int64_t levels = integer(args.next());
    const QParamsConfig config = qparams_config(&args);
    const Array scale = single(args.next(), "scale"), zero_point = single(args.next(), "zero_point");
    double found[2];  // memory for two values of the buffers' type, which takes at most 8 bytes
    const Array new_min = {&found[0], low.type, 1, "new_min"}, new_max = {&found[1], high.type, 1, "new_max"};
    search_histogram_range(histogram, low, high, levels, new_min, new_max);
    choose_qparams(new_min, new_max, eps, config, scale, zero_point);
  });
}

PyObject* fake_quantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 8, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    const Array scale = buffer(args.next(), "scale"), zero_point = buffer(args.next(), "zero_point");
    const Dense x = dense(t, optional_integer(args.next()));
    const int64_t quant_min = integer(args.next()), quant_max = integer(args.next());
    void* const y = output(args.next(), t);
    uint64_t* const mask = mask_words_in(args.next(), x.numel());
    const WithoutGil released(x.numel());
    fake_quantize(x, scale, zero_point, quant_min, quant_max, y, mask);
  });
}

PyObject* fused_observe_fake_quantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 4, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    const FusedSettings s(args.next());
    const Dense x = dense(t, s.observe.ch_axis);
    PyObject* const result = args.next();
    void* const y = result == Py_None ? nullptr : output(result, t);
    uint64_t* const mask = mask_words_in(args.next(), x.numel());
    const WithoutGil released(x.numel());
    if (s.observes) observe_qparams(x, s.buffers, s.observe);
    if (y != nullptr) {
      const QParamsConfig& q = s.observe.qparams;
      fake_quantize(x, s.buffers.scale, s.buffers.zero_point, q.quant_min, q.quant_max, y, mask);
    }
  });
}

PyObject* add_observe_fake_quantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 7, [](Arguments args) {
    const DLTensor t = tensor(args.next()), other = tensor(args.next());
    const double low = number(args.next()), high = number(args.next());
    const FusedSettings s(args.next());
    require(is_like(other, t) && low < high && !s.observe.ch_axis.has_value());
    const SumOfTensors sum = {dense(t, std::nullopt), other.data, low, high};
    void* const y = output(args.next(), t);
    uint64_t* const mask = mask_words_in(args.next(), sum.a.numel());
    const bool quantizes = flag(s.fake_quant_enabled);
    const WithoutGil released(sum.a.numel());
    if (s.observes) observe_clamped_sum(sum, s.buffers, s.observe);
    if (quantizes) {
      const QParamsConfig& q = s.observe.qparams;
      fake_quantize_clamped_sum(sum, s.buffers.scale, s.buffers.zero_point, q.quant_min, q.quant_max, y, mask);
    } else {
      clamped_sum(sum, y, mask);
    }
  });
}

PyObject* observe_folded_weight_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 6, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    const Dense weight = output_channels(t);
    const Array bn_weight = buffer(args.next(), "bn_weight"), bn_std = buffer(args.next(), "bn_std");
    const FusedSettings s(args.next());
    const auto axis = s.observe.ch_axis;
    require(!axis.has_value() || *axis == 0 || *axis == -t.ndim);
    const bool quantizes = flag(s.fake_quant_enabled);
    const Array folded = aligned_with_weight(args.next(), t, "folded");
    const Array fold = values(args.next(), "fold");
    const WithoutGil released(weight.numel());
    observe_folded_weight(weight, bn_weight, bn_std, s.buffers, s.observe, s.observes, quantizes, folded, fold);
  });
}

PyObject* fold_weight_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 5, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    const Dense weight = output_channels(t);
    const Array fold = values(args.next(), "fold");
    const int64_t quant_min = integer(args.next()), quant_max = integer(args.next());
    const Array folded = aligned_with_weight(args.next(), t, "folded");
    const WithoutGil released(weight.numel());
    fold_weight(weight, fold, quant_min, quant_max, folded);
  });
}

PyObject* fold_weight_backward_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 7, [](Arguments args) {
    PyObject* const grad = args.next();
    const DLTensor t = tensor(args.next());
    const Dense weight = output_channels(t);
    const Array from = aligned_with_weight(grad, t, "grad");
    const Array fold = values(args.next(), "fold");
    const int64_t quant_min = integer(args.next()), quant_max = integer(args.next());
    const Array grad_weight = aligned_with_weight(args.next(), t, "grad_weight");
    require(grad_weight.type == weight.type);
    const Array grad_bn_weight = buffer(args.next(), "grad_bn_weight");
    const WithoutGil released(weight.numel());
    fold_weight_backward(weight, from, fold, quant_min, quant_max, grad_weight.data, grad_bn_weight);
  });
}

PyObject* batch_norm_observe_fake_quantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 14, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    const Dense x = batch_norm_input(t);
    BatchNorm batch_norm;
    batch_norm.weight = buffer(args.next(), "weight"), batch_norm.bias = buffer(args.next(), "bias");
    batch_norm.running_mean = buffer(args.next(), "running_mean");
    batch_norm.running_var = buffer(args.next(), "running_var");
    batch_norm.training = boolean(args.next());
    batch_norm.momentum = number(args.next()), batch_norm.eps = number(args.next());
    const double low = number(args.next()), high = number(args.next());
    const FusedSettings s(args.next());
    const Array norm = values(args.next(), "norm"), quantizer = values(args.next(), "quantizer");
    require(norm.numel == 4 * x.channels && norm.type == compute_type(x.type));
    require(quantizer.numel == 3 && quantizer.type == Element::f64 && !s.observe.ch_axis.has_value());
    void* const y = output(args.next(), t);
    const ObservedQuantizer observed = {s.buffers, s.observe, s.observes, flag(s.fake_quant_enabled)};
    const WithoutGil released(x.numel());
    observe_batch_norm(x, batch_norm, {low, high}, observed, norm.data, static_cast<double*>(quantizer.data));
    const QParamsConfig& q = s.observe.qparams;
    batch_norm_fake_quantize(x, norm, quantizer, {low, high}, {q.quant_min, q.quant_max}, y);
  });
}

PyObject* batch_norm_fake_quantize_backward_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 12, [](Arguments args) {
    const DLTensor g = tensor(args.next()), t = tensor(args.next());
    const Dense x = batch_norm_input(t);
    require(is_like(g, t));
    const Array norm = values(args.next(), "norm"), quantizer = values(args.next(), "quantizer");
    const bool training = boolean(args.next());
    const double low = number(args.next()), high = number(args.next());
    const int64_t quant_min = integer(args.next()), quant_max = integer(args.next());
    void* const grad_x = output(args.next(), t);
    const Array grad_weight = buffer(args.next(), "grad_weight"), grad_bias = buffer(args.next(), "grad_bias");
    const WithoutGil released(x.numel());
    batch_norm_fake_quantize_backward(x, g.data, norm, quantizer, training, {low, high}, {quant_min, quant_max},
                                      grad_x, grad_weight, grad_bias);
  });
}

PyObject* fake_quantize_backward_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    const Dense grad = dense(t, std::nullopt);
    const uint64_t* const mask = mask_words_in(args.next(), grad.numel());
    require(mask != nullptr);
    void* const out = output(args.next(), t);
    const WithoutGil released(grad.numel());
    mask_gradient(grad, mask, out);
  });
}

}  // namespace fastquant
