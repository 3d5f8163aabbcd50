// The extension module fastquant._C. Importing it registers the ops. Its functions query and select the
// instruction set of the CPU kernels, and make the fast calls (fast_calls.h) available.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/dispatch.h"
#include "python/convolution_calls.h"
#include "python/embedding_calls.h"
#include "python/fast_calls.h"
#include "python/quantized_calls.h"

namespace {

PyObject* names(const char* (*nth)(int)) {
  PyObject* list = PyList_New(0);
  for (int i = 0; list != nullptr && nth(i) != nullptr; ++i) {
    PyObject* name = PyUnicode_FromString(nth(i));
    if (name == nullptr || PyList_Append(list, name) != 0) Py_CLEAR(list);
    Py_XDECREF(name);
  }
  return list;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastquant::isa()); }

PyObject* isas(PyObject*, PyObject*) { return names(fastquant::usable_isa); }

PyObject* built_isas(PyObject*, PyObject*) { return names(fastquant::built_isa); }

PyObject* set_isa(PyObject*, PyObject* arg) {
  const char* name = PyUnicode_Check(arg) ? PyUnicode_AsUTF8AndSize(arg, nullptr) : "";
  if (name == nullptr) return nullptr;
  if (!fastquant::set_isa(name)) {
    return PyErr_Format(PyExc_ValueError, "no usable kernels for isa %R; isas() lists them", arg);
  }
  Py_RETURN_NONE;
}

PyMethodDef fast_call(const char* name, fastquant::FastCall f, const char* doc) {
  return {name, fastquant::as_method(f), METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "isa() -> str\n\nInstruction set of the CPU kernels in use."},
    {"isas", isas, METH_NOARGS,
     "isas() -> list[str]\n\nInstruction sets that were built and that this processor runs, best first."},
    {"built_isas", built_isas, METH_NOARGS,
     "built_isas() -> list[str]\n\nInstruction sets that were built, best first."},
    {"set_isa", set_isa, METH_O,
     "set_isa(name)\n\nUse the kernels of this instruction set from now on, in every thread."},
    {"set_up_fast_calls", fastquant::set_up_fast_calls, METH_VARARGS,
     "set_up_fast_calls(exchange_api, tensor_type, parameter_type)\n\nMust be called before the functions "
     "below. Takes torch.Tensor's DLPack C exchange API, and torch.Tensor and\nnn.Parameter, the only types "
     "(not subclasses) that they accept."},
    {"is_on", fastquant::is_on_call, METH_O,
     "is_on(flag) -> bool | None\n\nWhether a CPU tensor of one element is not zero; None for anything else."},
    fast_call(
        "prefer_huge_pages", fastquant::prefer_huge_pages_call,
        "prefer_huge_pages(x) -> True | None\n\nAsks the system for huge pages for the memory of a new tensor, "
        "if it is large. None: of this kind of tensor\nit is not known where its memory lies."),
    fast_call(
        "observe_minmax_", fastquant::observe_minmax_call,
        "observe_minmax_(...) -> True | int | None\n\nRuns the op of this name without torch's dispatcher, and "
        "returns True. Returns None, and\nchanges nothing, where it does not support the arguments: the "
        "caller then calls the op.\nReturns the number of non-finite elements where these are refused."),
    fast_call("observe_histogram_", fastquant::observe_histogram_call,
              "observe_histogram_(...) -> True | int | None\n\nThe same as observe_minmax_ for this op."),
    fast_call("histogram_qparams", fastquant::histogram_qparams_call,
              "histogram_qparams(histogram, min_val, max_val, eps, dst_nbins, quant_min, quant_max, scheme, "
              "symmetric_zero_point, scale, zero_point) -> True | None\n\nRuns search_histogram_range and, on "
              "the range that it finds, choose_qparams, and writes\nscale and zero_point. Returns None, and "
              "changes nothing, where only the ops support the arguments."),
    fast_call(
        "fake_quantize", fastquant::fake_quantize_call,
        "fake_quantize(x, scale, zero_point, ch_axis, quant_min, quant_max, y, mask) -> True | None\n\n"
        "Runs the op, and writes its results to y and, unless it is None, to mask. Returns None, and\nchanges "
        "nothing, where only the op supports the arguments."),
    fast_call(
        "fused_observe_fake_quantize", fastquant::fused_observe_fake_quantize_call,
        "fused_observe_fake_quantize(x, settings, y, mask) -> True | int | None\n\nRuns the op, and writes its "
        "results to y and mask. Where y is None, it only observes x.\nReturns what observe_minmax_ does. "
        "settings: a "
        "fastquant._native.settings.FusedSettings, "
        "whose fake_quant_enabled is not read."),
    fast_call(
        "add_observe_fake_quantize", fastquant::add_observe_fake_quantize_call,
        "add_observe_fake_quantize(a, b, low, high, settings, y, mask) -> True | int | None\n\nRuns the op, "
        "and writes its results to y and, unless it is None, to mask. Returns what observe_minmax_\ndoes. "
        "settings: a fastquant._native.settings.FusedSettings."),
    fast_call(
        "observe_folded_weight_", fastquant::observe_folded_weight_call,
        "observe_folded_weight_(weight, bn_weight, bn_std, settings, folded, fold) -> True | int | None\n\n"
        "Runs the op, and writes its results to folded and fold. Returns what observe_minmax_ does.\n"
        "settings: a fastquant._native.settings.FusedSettings."),
    fast_call(
        "fold_weight", fastquant::fold_weight_call,
        "fold_weight(weight, fold, quant_min, quant_max, folded) -> True | None\n\nRuns the op, and writes "
        "its result to folded. Returns None, and changes nothing, where only the op\nsupports the "
        "arguments."),
    fast_call(
        "fold_weight_backward", fastquant::fold_weight_backward_call,
        "fold_weight_backward(grad, weight, fold, quant_min, quant_max, grad_weight, grad_bn_weight) -> True "
        "| None\n\nRuns the op, and writes its results to grad_weight, which may be grad, and to "
        "grad_bn_weight.\nReturns None, and changes nothing, where only the op supports the arguments."),
    fast_call(
        "batch_norm_observe_fake_quantize", fastquant::batch_norm_observe_fake_quantize_call,
        "batch_norm_observe_fake_quantize(x, weight, bias, running_mean, running_var, training, momentum, "
        "bn_eps, low, high, settings, norm, quantizer, y) -> True | int | None\n\nRuns the ops "
        "observe_batch_norm_ and batch_norm_fake_quantize, and writes their results to norm, quantizer and "
        "y.\nReturns what observe_minmax_ does. settings: a fastquant._native.settings.FusedSettings."),
    fast_call(
        "batch_norm_fake_quantize_backward", fastquant::batch_norm_fake_quantize_backward_call,
        "batch_norm_fake_quantize_backward(grad, x, norm, quantizer, training, low, high, quant_min, "
        "quant_max, grad_x, grad_weight, grad_bias) -> True | None\n\nRuns the op, and writes its results to "
        "the last three. Returns None, and changes nothing, where only\nthe op supports the arguments."),
    fast_call("fake_quantize_backward", fastquant::fake_quantize_backward_call,
              "fake_quantize_backward(grad, mask, out) -> True | None\n\nRuns the op, and writes its result to "
              "out, which must have the strides of grad. Returns None, and\nchanges nothing, where only the op "
              "supports the arguments."),
    fast_call("pointwise_convolution", fastquant::pointwise_convolution_call,
              "pointwise_convolution(x, weight, bias, y) -> True | None\n\nA convolution with a kernel of one "
              "element, on tensors of one type and memory format, into y. bias may be None.\nReturns None, and "
              "changes nothing, "
              "where it does not support the arguments: torch then has to do it."),
    fast_call("pointwise_grad_input", fastquant::pointwise_grad_input_call,
              "pointwise_grad_input(grad, weight, grad_x) -> True | None\n\nThe same for its gradient of the "
              "input, into grad_x."),
    fast_call("pointwise_grad_weight", fastquant::pointwise_grad_weight_call,
              "pointwise_grad_weight(grad, x, grad_weight) -> True | None\n\nThe same for its gradient of the "
              "weight, into grad_weight."),
    fast_call(
        "depthwise_convolution", fastquant::depthwise_convolution_call,
        "depthwise_convolution(x, weight, bias, stride, y) -> True | None\n\nWrites the convolution, padded by "
        "half the kernel, to y. Returns None, and changes nothing, unless all\nare contiguous, of one dtype, "
        "float32 or bfloat16, and the kernel has 3x3, 5x5 or 7x7 taps."),
    fast_call(
        "depthwise_convolution_backward", fastquant::depthwise_convolution_backward_call,
        "depthwise_convolution_backward(grad, x, weight, stride, grad_x, grad_weight) -> True | None\n\nWrites "
        "the gradients to the last two, unless they are None. grad_x may be grad. Returns None where\n"
        "depthwise_convolution does."),
    fast_call(
        "winograd_convolution", fastquant::winograd_convolution_call,
        "winograd_convolution(x, weight, bias, y) -> bool | None\n\nA convolution of 3x3 taps, with stride "
        "and padding 1, on tensors of one type and memory format, into y. bias may be\nNone. Returns whether "
        "all of y is finite: if not, torch has to compute it. Returns None, and changes nothing,\nwhere it "
        "does not support the arguments."),
    fast_call("winograd_grad_input", fastquant::winograd_grad_input_call,
              "winograd_grad_input(grad, weight, grad_x) -> bool | None\n\nThe same for its gradient of the "
              "input, into grad_x."),
    fast_call("winograd_grad_weight", fastquant::winograd_grad_weight_call,
              "winograd_grad_weight(grad, x, grad_weight) -> bool | None\n\nThe same for its gradient of the "
              "weight, into grad_weight."),
    fast_call(
        "tiled_convolution", fastquant::tiled_convolution_call,
        "tiled_convolution(x, weight, bias, y) -> bool | None\n\nA convolution of 1x1 or 3x3 taps, with "
        "stride 1 and a padding of half the kernel, on contiguous tensors of bfloat16, into y. bias may "
        "be\nNone. Returns whether all of y is finite: if not, torch has to compute it. Returns None, and "
        "changes nothing,\nwhere it does not support the arguments, or the instruction set has no tiles."),
    fast_call(
        "tiled_grad_input", fastquant::tiled_grad_input_call,
        "tiled_grad_input(grad, weight, grad_x) -> bool | None\n\nThe same for its gradient of the input, "
        "into grad_x."),
    fast_call("tiled_grad_weight", fastquant::tiled_grad_weight_call,
              "tiled_grad_weight(grad, x, grad_weight) -> bool | None\n\nThe same for its gradient of the "
              "weight, into grad_weight."),
    fast_call("quantized_embedding", fastquant::quantized_embedding_call,
              "quantized_embedding(packed, dim, bits, indices, y) -> True | None\n\nRuns the op, and writes "
              "its result to y. Returns None where only the op supports the arguments."),
    fast_call("quantized_embedding_bag", fastquant::quantized_embedding_bag_call,
              "quantized_embedding_bag(packed, dim, bits, indices, offsets, per_sample_weights, mapping, mode, "
              "include_last_offset, padding_idx, y) -> True | None\n\nThe same."),
    {"set_up_quantized_calls", fastquant::set_up_quantized_calls, METH_VARARGS,
     "set_up_quantized_calls(quantized_type, empty_strided, as_float32)\n\nMust be called, after "
     "set_up_fast_calls, before the functions below. Takes the class of quantized tensors,\nand "
     "torch.empty_strided with the keyword arguments by which it makes a float32 tensor."},
    fast_call("quantized_conv", fastquant::quantized_conv_call,
              "quantized_conv(x, packed_weight, weight_scale, bias, weight_shape, stride, padding, dilation, "
              "groups, scale, zero_point, low, high) -> Tensor | None\n\nRuns the op of this name on quantized "
              "tensors, without torch's dispatcher, and returns a quantized tensor.\nReturns None where only "
              "the op supports the arguments."),
    fast_call("quantized_conv_transpose", fastquant::quantized_conv_transpose_call,
              "quantized_conv_transpose(x, packed_weight, weight_scale, bias, weight_shape, stride, padding, "
              "output_padding, dilation, groups, scale, zero_point, low, high) -> Tensor | None\n\nThe same."),
    fast_call("quantized_linear", fastquant::quantized_linear_call,
              "quantized_linear(x, in_features, packed_weight, weight_scale, bias, out_features, scale, "
              "zero_point, low, "
              "high) -> Tensor | None\n\nThe same."),
    fast_call("quantized_add", fastquant::quantized_add_call,
              "quantized_add(a, b, scale, zero_point, low, high) -> Tensor | None\n\nThe same."),
    fast_call("quantized_mul", fastquant::quantized_mul_call,
              "quantized_mul(a, b, scale, zero_point, low, high) -> Tensor | None\n\nThe same."),
    fast_call("quantized_cat", fastquant::quantized_cat_call,
              "quantized_cat(tensors, dim, scale, zero_point, low, high) -> Tensor | None\n\nThe same."),
    fast_call("lookup", fastquant::lookup_call,
              "lookup(x, table, scale, zero_point) -> Tensor | None\n\nThe same."),
    fast_call("quantized_clamp", fastquant::quantized_clamp_call,
              "quantized_clamp(x, lowest, highest, in_place) -> Tensor | None\n\nLimits integers to [lowest, "
              "highest]; "
              "x keeps its scale and zero point."),
    fast_call("quantize", fastquant::quantize_call,
              "quantize(x, scale, zero_point, is_int8) -> Tensor | None\n\nThe same for an ordinary tensor; "
              "the result of three to five dimensions has its channels last."),
    fast_call("dequantize", fastquant::dequantize_call,
              "dequantize(x) -> Tensor | None\n\nThe same; returns an ordinary float32 tensor."),
    fast_call("dynamic_linear", fastquant::dynamic_linear_call,
              "dynamic_linear(x, in_features, packed_weight, weight_scale, bias, out_features, relu, "
              "reduce_range) -> Tensor | "
              "None\n\nThe same; takes and returns ordinary float32 tensors."),
    fast_call("quantized_max_pool", fastquant::quantized_max_pool_call,
              "quantized_max_pool(x, dims, kernel_size, stride, padding, dilation, ceil_mode) -> Tensor | "
              "None\n\nThe same, along so many dimensions: sizes are one number or one for each. No stride "
              "means kernel_size."),
    fast_call("quantized_avg_pool", fastquant::quantized_avg_pool_call,
              "quantized_avg_pool(x, dims, kernel_size, stride, padding, ceil_mode, count_include_pad, "
              "divisor_override) -> Tensor | None\n\nThe same."),
    fast_call("quantized_adaptive_avg_pool", fastquant::quantized_adaptive_avg_pool_call,
              "quantized_adaptive_avg_pool(x, dims, output_size) -> Tensor | None\n\nThe same."),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
