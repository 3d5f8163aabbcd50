// The importable module fastquant._C. Importing it registers the ops; its functions tell
// which instruction set the CPU kernels use.
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
     "set_up_fast_calls(exchange_api, tensor_types, guards, is_neg, empty_like, empty_bytes)\n\n"
     "Makes the functions below usable: torch.Tensor's DLPack C exchange API, the exact types that\n"
     "they take, functions that say by a false result that nothing intercepts ops, torch.Tensor.is_neg,\n"
     "torch.empty_like, and what makes a CPU tensor of so many bytes."},
    fast_call("observe_minmax", fastquant::observe_minmax_call,
              "observe_minmax(...) -> True | None\n\nThe op observe_minmax_ without the dispatcher. None, with "
              "nothing done, where\nonly the op will do."),
    fast_call("observe_histogram", fastquant::observe_histogram_call,
              "observe_histogram(...) -> True | None\n\nLikewise for observe_histogram_."),
    fast_call(
        "histogram_qparams", fastquant::histogram_qparams_call,
        "histogram_qparams(...) -> True | None\n\nLikewise for search_histogram_range and, with its result, "
        "choose_qparams into\nthe scale and zero point that are given."),
    fast_call("fake_quantize", fastquant::fake_quantize_call,
              "fake_quantize(..., with_mask) -> y | (y, mask) | x | None\n\nLikewise for fake_quantize and "
              "fake_quantize_with_mask, but x itself where not enabled."),
    fast_call("observe_fake_quantize", fastquant::observe_fake_quantize_call,
              "observe_fake_quantize(..., with_mask) -> y | (y, mask) | x | None\n\nLikewise for "
              "fused_observe_fake_quantize and fused_observe_fake_quantize_with_mask."),
    fast_call("mask_gradient", fastquant::mask_gradient_call,
              "mask_gradient(grad, mask, stride) -> gradient | None\n\nLikewise for fake_quantize_backward, "
              "where grad has the stride of the output."),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
