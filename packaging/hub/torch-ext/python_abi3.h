// The part of pybind11 that the bindings of csrc/bind use, on Python's limited API.
//
// A module of the Hugging Face kernels format keeps to that API ("abi3"): one file serves all
// versions of Python from 3.9 on. pybind11 does not. In the copy of csrc/bind that build.py makes,
// this header stands in its place, so that both modules check and decode by the same lines.
// tests/test_hub_package.py compares the two modules' answers, errors included.
#pragma once

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x03090000
#endif
#include <Python.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "pyloss_version.h"  // written by build.py

#if defined(CUDA_KERNEL) && !defined(PYLOSS_WITH_CUDA)  // kernel-builder's name for it
#define PYLOSS_WITH_CUDA 1
#endif

// Macros of the full API, which the bindings use after a check of the type.
#define PyTuple_GET_SIZE PyTuple_Size
#define PyTuple_GET_ITEM PyTuple_GetItem
#define PyFloat_AS_DOUBLE PyFloat_AsDouble

#pragma GCC visibility push(hidden)  // as pybind11's own: a process may hold both
namespace pybind11 {

// Thrown where Python has an error set.
struct error_already_set {};

struct type_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A borrowed reference.
class handle {
 public:
  handle() = default;
  handle(PyObject* object) : object_(object) {}
  PyObject* ptr() const { return object_; }

 protected:
  PyObject* object_ = nullptr;
};

// An owned reference.
class object : public handle {
 public:
  object() = default;
  static object own(PyObject* fresh) {
    if (!fresh) throw error_already_set();
    object o;
    o.object_ = fresh;
    return o;
  }
  object(const object& other) : handle(other.object_) { Py_XINCREF(object_); }
  object(object&& other) noexcept : handle(std::exchange(other.object_, nullptr)) {}
  object& operator=(object other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~object() { Py_XDECREF(object_); }
};

inline object to_python(const object& value) {
  return value;
}
inline object to_python(bool value) {
  return object::own(PyBool_FromLong(value));
}
inline object to_python(int64_t value) {
  return object::own(PyLong_FromLongLong(value));
}
inline object to_python(int value) {
  return to_python(int64_t(value));
}
inline object to_python(double value) {
  return object::own(PyFloat_FromDouble(value));
}
inline object to_python(const std::string& value) {
  return object::own(PyUnicode_FromStringAndSize(value.data(), Py_ssize_t(value.size())));
}
inline object to_python(const char* value) {
  return to_python(std::string(value));
}

// `container[key] = value` and `object.attr(name) = value`: Set is how a container stores.
template <class Key, int (*Set)(PyObject*, Key, PyObject*)>
class Place {
 public:
  Place(PyObject* container, Key key) : container_(container), key_(key) {}
  template <class T>
  void operator=(const T& value) {
    if (Set(container_, key_, to_python(value).ptr()) != 0) throw error_already_set();
  }

 protected:
  PyObject* container_;
  Key key_;
};

class Attribute : public Place<const char*, PyObject_SetAttrString> {
 public:
  using Place::operator=;
  using Place::Place;
  operator object() const { return object::own(PyObject_GetAttrString(container_, key_)); }
};

inline int set_new_item(PyObject* tuple, Py_ssize_t i, PyObject* value) {
  Py_INCREF(value);  // PyTuple_SetItem takes it over
  return PyTuple_SetItem(tuple, i, value);
}

class dict : public object {
 public:
  dict() : object(own(PyDict_New())) {}
  explicit dict(object other) : object(std::move(other)) {}
  Place<const char*, PyDict_SetItemString> operator[](const char* key) const {
    return {object_, key};
  }
};

class tuple : public object {
 public:
  explicit tuple(size_t size) : object(own(PyTuple_New(Py_ssize_t(size)))) {}
  Place<Py_ssize_t, set_new_item> operator[](size_t i) const { return {object_, Py_ssize_t(i)}; }
};

namespace detail {

// Of the object's type, as in messages of Python.
inline std::string obj_class_name(PyObject* value) {
  const object name =
      object::own(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__name__"));
  const object bytes = object::own(PyUnicode_AsUTF8String(name.ptr()));
  return PyBytes_AsString(bytes.ptr());
}

// One argument of a function.
template <class T>
struct Argument;
template <>
struct Argument<handle> {
  static handle from(PyObject* value) { return value; }
};
template <>
struct Argument<int64_t> {
  static int64_t from(PyObject* value) {
    if (PyFloat_Check(value)) throw type_error("needs an integer, got float");
    const int64_t found = PyLong_AsLongLong(value);
    if (found == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      throw type_error("needs an integer of 64 bits, got " + obj_class_name(value));
    }
    return found;
  }
};
template <>
struct Argument<bool> {
  static bool from(PyObject* value) {
    if (!PyBool_Check(value)) throw type_error("needs a bool, got " + obj_class_name(value));
    return value == Py_True;
  }
};

// A function that Python can call; there is one type for each lambda, which holds it.
template <class F, class Signature>
struct Function;
template <class F, class R, class... Args>
struct Function<F, R (F::*)(Args...) const> {
  inline static PyMethodDef method{};
  inline static const F* body = nullptr;

  template <size_t... I>
  static PyObject* call(PyObject* arguments, std::index_sequence<I...>) {
    if (PyTuple_Size(arguments) != Py_ssize_t(sizeof...(Args))) {
      throw type_error("takes " + std::to_string(sizeof...(Args)) + " arguments, got " +
                       std::to_string(PyTuple_Size(arguments)));
    }
    if constexpr (std::is_void_v<R>) {
      (*body)(Argument<Args>::from(PyTuple_GetItem(arguments, I))...);
      Py_INCREF(Py_None);
      return Py_None;
    } else {
      object result = to_python((*body)(Argument<Args>::from(PyTuple_GetItem(arguments, I))...));
      Py_INCREF(result.ptr());
      return result.ptr();
    }
  }

  // The exceptions are translated as pybind11 does it.
  static PyObject* entry(PyObject*, PyObject* arguments) {
    const auto fail = [](PyObject* type, const std::string& what) -> PyObject* {
      PyErr_SetString(type, what.c_str());
      return nullptr;
    };
    try {
      return call(arguments, std::index_sequence_for<Args...>());
    } catch (const error_already_set&) {
      return nullptr;
    } catch (const type_error& e) {
      return fail(PyExc_TypeError, std::string(method.ml_name) + "(): " + e.what());
    } catch (const std::invalid_argument& e) {
      return fail(PyExc_ValueError, e.what());
    } catch (const std::out_of_range& e) {
      return fail(PyExc_IndexError, e.what());
    } catch (const std::bad_alloc& e) {
      return fail(PyExc_MemoryError, e.what());
    } catch (const std::exception& e) {
      return fail(PyExc_RuntimeError, e.what());
    }
  }
};

}  // namespace detail

class module_ : public object {
 public:
  explicit module_(object other) : object(std::move(other)) {}

  Attribute attr(const char* name) const { return {object_, name}; }

  template <class F, class = decltype(&F::operator())>
  void def(const char* name, const F& function) const {
    using Callable = detail::Function<F, decltype(&F::operator())>;
    static const F kept = function;
    Callable::body = &kept;
    Callable::method = {name, &Callable::entry, METH_VARARGS, nullptr};
    attr(name) = object::own(PyCFunction_NewEx(&Callable::method, nullptr, nullptr));
  }
};

class gil_scoped_release {
 public:
  gil_scoped_release() : state_(PyEval_SaveThread()) {}
  ~gil_scoped_release() { PyEval_RestoreThread(state_); }
  gil_scoped_release(const gil_scoped_release&) = delete;
  gil_scoped_release& operator=(const gil_scoped_release&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace pybind11
#pragma GCC visibility pop
