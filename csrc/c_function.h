// Functions of Python in plain C: pybind11's way to one takes a tenth of a small step.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace fastcell {

namespace py = pybind11;

inline py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// What such a function may do: raise.
template <class F>
PyObject* guarded(F f) {
  try {
    return f().release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace fastcell
