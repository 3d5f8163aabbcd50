#include "python/fast_calls.h"

#include "cpu/batch_norm.h"
#include "cpu/clamped_sum.h"
#include "cpu/fake_quantize.h"
#include "cpu/folded_weight.h"
#include "cpu/huge_pages.h"
#include "cpu/ranges.h"
#include "cpu/statistics.h"
#include "python/arguments.h"

namespace fastquant {
namespace {

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
    observe.averaging_constant = optional_real(fields.next());
    observe.qparams = qparams_config(&fields);
    observe.nonfinite = static_cast<NonFinite>(integer(fields.next()));
  }

  static constexpr int kFields = 15;
  bool observes;
  PyObject* fake_quant_enabled;
  FusedBuffers buffers;
  ObserveSettings observe;
};

}  // namespace

PyObject* is_on_call(PyObject*, PyObject* object) {
  try {
    require(exchange != nullptr);
    return PyBool_FromLong(flag(object));
  } catch (const NeedsOp&) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

PyObject* prefer_huge_pages_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 1, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    prefer_huge_pages(t.data, numel(t) * (t.bits / 8));
  });
}

PyObject* observe_minmax_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 7, [](Arguments args) {
    const DLTensor t = tensor(args.next());
    const Array low = buffer(args.next(), "min_val"), high = buffer(args.next(), "max_val");
    const Array nonfinite_count = single(args.next(), "nonfinite_count");
    const Dense x = dense(t, optional_integer(args.next()));
    const auto averaging_constant = optional_real(args.next());
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
    if (s.observes && y != nullptr) {
      observe_fake_quantize(x, s.buffers, s.observe, y, mask);
    } else if (s.observes) {
      observe_qparams(x, s.buffers, s.observe);
    } else if (y != nullptr) {
      const QParamsConfig& q = s.observe.qparams;
      fake_quantize(x, s.buffers.scale, s.buffers.zero_point, q.quant_min, q.quant_max, y, mask);
    }
  });
}

PyObject* add_observe_fake_quantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 7, [](Arguments args) {
    const DLTensor t = tensor(args.next()), other = tensor(args.next());
    const double low = real(args.next()), high = real(args.next());
    const FusedSettings s(args.next());
    require(is_like(other, t) && low < high && !s.observe.ch_axis.has_value());
    const SumOfTensors sum = {dense(t, std::nullopt), other.data, low, high};
    void* const y = output(args.next(), t);
    uint64_t* const mask = mask_words_in(args.next(), sum.a.numel());
    const bool quantizes = flag(s.fake_quant_enabled);
    const WithoutGil released(sum.a.numel());
    const QParamsConfig& q = s.observe.qparams;
    if (s.observes && quantizes) {
      observe_fake_quantize_clamped_sum(sum, s.buffers, s.observe, y, mask);
    } else if (quantizes) {
      fake_quantize_clamped_sum(sum, s.buffers.scale, s.buffers.zero_point, q.quant_min, q.quant_max, y, mask);
    } else {
      if (s.observes) observe_clamped_sum(sum, s.buffers, s.observe);
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
    batch_norm.momentum = real(args.next()), batch_norm.eps = real(args.next());
    const double low = real(args.next()), high = real(args.next());
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
    const double low = real(args.next()), high = real(args.next());
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
