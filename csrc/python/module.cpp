// The extension module fastquant._C. Importing it registers the ops. Its functions query and select the
// instruction set of the CPU kernels, and make the fast calls (fast_calls.h) available.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/dispatch.h"
#include "python/fast_calls.h"

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
     "set_up_fast_calls(exchange_api, tensor_type, parameter_type)\n\nMakes the functions below usable: "
     "torch.Tensor's DLPack C exchange API, and the two\nexact types that they take."},
    {"is_on", fastquant::is_on_call, METH_O,
     "is_on(flag) -> bool | None\n\nWhether a CPU tensor of one element is not zero; None for anything else."},
    fast_call("observe_minmax_", fastquant::observe_minmax_call,
              "observe_minmax_(...) -> True | int | None\n\nThe op of this name without the dispatcher. Where "
              "only the op will do: None, with\nnothing done. Where non-finite elements are refused: how many "
              "there are."),
    fast_call("observe_histogram_", fastquant::observe_histogram_call,
              "observe_histogram_(...) -> True | int | None\n\nLikewise."),
    fast_call("histogram_qparams", fastquant::histogram_qparams_call,
              "histogram_qparams(histogram, min_val, max_val, eps, dst_nbins, quant_min, quant_max, scheme, "
              "symmetric_zero_point, scale, zero_point) -> True | None\n\nLikewise for search_histogram_range "
              "and, with its result, choose_qparams,\ninto scale and zero_point."),
    fast_call("fake_quantize", fastquant::fake_quantize_call,
              "fake_quantize(x, scale, zero_point, ch_axis, quant_min, quant_max, y, mask) -> True | None\n\n"
              "Likewise, into y and, where it is a tensor, into mask."),
    fast_call(
        "fused_observe_fake_quantize", fastquant::fused_observe_fake_quantize_call,
        "fused_observe_fake_quantize(x, settings, y, mask) -> True | int | None\n\nLikewise, into y and "
        "mask; where y is None, x is only observed. settings:\na fastquant._native.settings.FusedSettings, "
        "whose fake_quant_enabled is not read."),
    fast_call("fake_quantize_backward", fastquant::fake_quantize_backward_call,
              "fake_quantize_backward(grad, mask, out) -> True | None\n\nLikewise, into out, which lies as "
              "grad does."),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
