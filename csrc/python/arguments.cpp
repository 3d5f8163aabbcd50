#include "python/arguments.h"

#include "python/fast_calls.h"

namespace fastquant {

const DLPackExchangeAPI* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;

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

}  // namespace fastquant
