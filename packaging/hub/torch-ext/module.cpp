// The compiled module of the package: the bindings of pyloss that its functions need.
//
// Its functions take addresses and sizes, as those of pyloss._C do, and no torch header is
// included: one build serves every torch version. The ops themselves are registered with torch from
// Python, in the namespace that is this build's alone.
#include "python_abi3.h"

#include "bind/register.h"

#define PYLOSS_JOIN_(a, b) a##b
#define PYLOSS_JOIN(a, b) PYLOSS_JOIN_(a, b)
#define PYLOSS_TEXT_(a) #a
#define PYLOSS_TEXT(a) PYLOSS_TEXT_(a)

PyMODINIT_FUNC PYLOSS_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   PYLOSS_TEXT(TORCH_EXTENSION_NAME),
                                   nullptr,
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  try {
    pybind11::module_ m(pybind11::object::own(PyModule_Create(&definition)));
    pyloss::register_about(m);
    pyloss::register_gemm(m);
    pyloss::register_linear_cross_entropy(m);
    pyloss::register_row_softmax(m);
    Py_INCREF(m.ptr());
    return m.ptr();
  } catch (const pybind11::error_already_set&) {
    return nullptr;
  }
}
