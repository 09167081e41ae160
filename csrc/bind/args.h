// Checked decoding of what Python passes: addresses, sizes, strides and codes as integers.
//
// Python owns every buffer and says how large it is; these checks turn a wrong call into an
// exception while the call still knows the argument's name. std::invalid_argument becomes
// ValueError.
//
// What belongs together crosses as one record: a NamedTuple in pyloss/ops/<op>/records.py, declared
// once more here by PYLOSS_RECORD and read by the names of its fields through a Reader. A test
// compares the two lists (`_C.fields`), and a record of another length is refused.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "common/compiler.h"
#include "common/dtype.h"

namespace pyloss {

[[noreturn]] inline void bad_argument(const std::string& name, const std::string& what) {
  throw std::invalid_argument(name + ": " + what);
}

// Product of sizes; refuses negative ones and more bytes than an address can span.
inline int64_t checked_count(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t n = 1;
  for (int64_t s : sizes) {
    if (s < 0) bad_argument(name, "negative size " + std::to_string(s));
  }
  for (int64_t s : sizes) {
    if (multiply_overflows(n, s, &n) || n > INT64_MAX / 8) bad_argument(name, "size overflows");
  }
  return n;
}

// A non-empty buffer needs an address: FakeTensors and empty tensors have none.
template <class T = void>
T* checked_pointer(const char* name, int64_t address, int64_t count) {
  if (address < 0 || (address == 0 && count > 0)) bad_argument(name, "no data at this address");
  return reinterpret_cast<T*>(address);
}
// Null where Python passes 0.
template <class T = void>
T* optional_pointer(const char* name, int64_t address) {
  return checked_pointer<T>(name, address, 0);
}

inline DType checked_dtype(const char* name, int64_t code) {
  if (code < 0 || code >= kDTypeCount) {
    bad_argument(name, "unknown dtype code " + std::to_string(code));
  }
  return static_cast<DType>(code);
}
inline bool is_float(DType t) {
  return t <= DType::kF16;
}
// The dtypes of what is never computed in half precision.
inline bool is_float32_or_float64(DType t) {
  return t == DType::kF32 || t == DType::kF64;
}

inline DType checked_float(const char* name, int64_t code) {
  const DType t = checked_dtype(name, code);
  if (!is_float(t)) bad_argument(name, "not a floating dtype");
  return t;
}

inline DType checked_float32_or_float64(const char* name, int64_t code) {
  const DType t = checked_dtype(name, code);
  if (!is_float32_or_float64(t)) bad_argument(name, "must be float32 or float64");
  return t;
}

inline int checked_threads(int64_t threads) {
  if (threads < 1 || threads > 4096) bad_argument("threads", std::to_string(threads));
  return static_cast<int>(threads);
}

// What is wrong with strides, in elements, or null: the last element must be addressable.
inline const char* wrong_strides(const int64_t* sizes, const int64_t* strides, size_t count) {
  int64_t last = 0;
  for (size_t i = 0; i < count; ++i) {
    int64_t span;
    if (strides[i] < 0) return "negative stride";
    // Also where the size is 1 and the stride means nothing: it is multiplied all the same.
    if (strides[i] > INT64_MAX / 256) return "strides overflow";
    if (sizes[i] > 0 && (multiply_overflows(sizes[i] - 1, strides[i], &span) ||
                         add_overflows(last, span, &last) || last > INT64_MAX / 8)) {
      return "strides overflow";
    }
  }
  return nullptr;
}
inline void check_strides(const char* name, std::initializer_list<int64_t> sizes,
                          std::initializer_list<int64_t> strides) {
  const char* wrong = wrong_strides(sizes.begin(), strides.begin(), sizes.size());
  if (wrong) bad_argument(name, wrong);
}

// PYLOSS_RECORD(Problem, rows, n, dtype): the fields of a record, in the order of the NamedTuple.
#define PYLOSS_RECORD(Record, ...)                     \
  struct Record {                                      \
    enum Field : int { __VA_ARGS__, kCount };          \
    static constexpr const char* kName = #Record;      \
    static constexpr const char* kText = #__VA_ARGS__; \
  }

// The names of a record's fields, from the text of their declaration.
template <class Record>
std::array<std::string, Record::kCount> field_names() {
  std::array<std::string, Record::kCount> names;
  std::string_view rest = Record::kText;
  for (std::string& name : names) {
    const size_t end = rest.find(',');
    name = rest.substr(0, end);
    rest.remove_prefix(end == rest.npos ? rest.size() : rest.find_first_not_of(" ,\n", end));
  }
  return names;
}

// Reads a record that Python passed. Reads only while the GIL is held, and keeps no reference: a
// Reader lives inside the call whose argument it reads.
template <class Record>
class Reader {
 public:
  using Field = typename Record::Field;

  explicit Reader(pybind11::handle record) : record_(record.ptr()) {
    if (!PyTuple_Check(record_) || PyTuple_GET_SIZE(record_) != Record::kCount) {
      bad_argument(Record::kName, "needs a tuple of " + std::to_string(Record::kCount) + " fields");
    }
  }

  [[noreturn]] void bad(Field f, const std::string& what) const {
    bad_argument(field_names<Record>()[f], what);
  }

  pybind11::handle item(Field f) const { return PyTuple_GET_ITEM(record_, Py_ssize_t(f)); }
  template <class Inner>
  Reader<Inner> record(Field f) const {
    return Reader<Inner>(item(f));
  }

  int64_t integer(Field f) const { return integer(f, item(f)); }
  double number(Field f) const { return number(f, item(f)); }
  bool flag(Field f) const {
    const int64_t value = integer(f);
    if (value != 0 && value != 1) bad(f, "not a flag");
    return value != 0;
  }

  template <class T = void>
  T* pointer(Field f, int64_t count) const {
    const int64_t address = integer(f);
    if (address < 0 || (address == 0 && count > 0)) bad(f, "no data at this address");
    return reinterpret_cast<T*>(address);
  }
  // Null where Python passes 0.
  template <class T = void>
  T* optional(Field f) const {
    return pointer<T>(f, 0);
  }
  template <class T = void>
  T* optional(Field f, Py_ssize_t i) const {
    const int64_t address = integer(f, i);
    if (address < 0) bad(f, "no data at this address");
    return reinterpret_cast<T*>(address);
  }

  DType dtype(Field f) const { return code<DType>(f, kDTypeCount); }
  DType floating(Field f) const {
    const DType t = dtype(f);
    if (!is_float(t)) bad(f, "not a floating dtype");
    return t;
  }
  DType float32_or_float64(Field f) const {
    const DType t = dtype(f);
    if (!is_float32_or_float64(t)) bad(f, "must be float32 or float64");
    return t;
  }
  // An enumerator below `count`.
  template <class E>
  E code(Field f, int64_t count) const {
    const int64_t value = integer(f);
    if (value < 0 || value >= count) bad(f, "unknown code " + std::to_string(value));
    return static_cast<E>(value);
  }

  // A field that is a tuple of integers: sizes, or addresses.
  template <size_t N>
  std::array<int64_t, N> integers(Field f) const {
    PyObject* tuple = item(f).ptr();
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != Py_ssize_t(N)) {
      bad(f, "needs a tuple of " + std::to_string(N));
    }
    std::array<int64_t, N> found;
    for (size_t i = 0; i < N; ++i) found[i] = integer(f, PyTuple_GET_ITEM(tuple, Py_ssize_t(i)));
    return found;
  }
  // Strides, in elements, with which all elements of the given sizes can be addressed.
  template <size_t N>
  std::array<int64_t, N> strides(Field f, const std::array<int64_t, N>& sizes) const {
    const std::array<int64_t, N> found = integers<N>(f);
    if (const char* wrong = wrong_strides(sizes.data(), found.data(), N)) bad(f, wrong);
    return found;
  }

  // A field that is a tuple of any number of records, or of numbers.
  Py_ssize_t length(Field f) const {
    if (!PyTuple_Check(item(f).ptr())) bad(f, "needs a tuple");
    return PyTuple_GET_SIZE(item(f).ptr());
  }
  template <class Inner>
  Reader<Inner> record(Field f, Py_ssize_t i) const {
    return Reader<Inner>(PyTuple_GET_ITEM(item(f).ptr(), i));
  }
  int64_t integer(Field f, Py_ssize_t i) const {
    return integer(f, pybind11::handle(PyTuple_GET_ITEM(item(f).ptr(), i)));
  }
  double number(Field f, Py_ssize_t i) const {
    return number(f, pybind11::handle(PyTuple_GET_ITEM(item(f).ptr(), i)));
  }

 private:
  int64_t integer(Field f, pybind11::handle value) const {
    if (!PyLong_Check(value.ptr())) bad_type(f, "an integer", value);
    const long long found = PyLong_AsLongLong(value.ptr());
    if (found == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      bad(f, "not a 64-bit integer");
    }
    return found;
  }
  double number(Field f, pybind11::handle value) const {
    if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
    if (!PyLong_Check(value.ptr())) bad_type(f, "a number", value);
    const double found = PyLong_AsDouble(value.ptr());
    if (found == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      bad(f, "not a double");
    }
    return found;
  }
  [[noreturn]] void bad_type(Field f, const char* wanted, pybind11::handle value) const {
    throw pybind11::type_error(field_names<Record>()[f] + ": needs " + wanted + ", got " +
                               pybind11::detail::obj_class_name(value.ptr()));
  }

  PyObject* record_;
};

// fn(args...) while other Python threads run; the arguments are decoded before, under the GIL.
template <class Fn, class... Args>
auto without_gil(const Fn& fn, const Args&... args) {
  pybind11::gil_scoped_release nogil;
  return fn(args...);
}

// Tells `_C.fields(op)` which records the functions of an op read.
template <class... Records>
void declare_records(pybind11::module_& m, const char* op) {
  pybind11::dict found;
  const auto declare = [&](const char* name, const auto& fields) {
    pybind11::tuple names(fields.size());
    for (size_t i = 0; i < fields.size(); ++i) names[i] = fields[i];
    found[name] = names;
  };
  (declare(Records::kName, field_names<Records>()), ...);
  pybind11::dict(m.attr("_records"))[op] = found;
}

}  // namespace pyloss
