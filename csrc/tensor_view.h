// Looking at torch's tensors from C++, through DLPack: where their numbers lie, and how.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace fastcell {

namespace py = pybind11;

// Null where there is none to be used: another kind of object, only other major versions, or none
// that shows a tensor.
inline const dlpack::ExchangeApi* exchange_api(py::handle capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  while (api && api->version.major != 1) api = api->earlier;
  return api && api->view ? api : nullptr;
}

// What the tensor is in memory; false if that cannot be told.
inline bool see(PyObject* object, const dlpack::ExchangeApi& api, dlpack::Tensor& view) {
  if (api.view(object, &view) == 0) return true;
  PyErr_Clear();
  return false;
}

// Whether it only says that its numbers are negated, which shows nowhere else.
inline bool negated(PyObject* object) {
  static PyObject* const method = PyUnicode_InternFromString("is_neg");
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, method));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

// Whether it has memory where it has elements: torch has zeros without.
inline bool has_memory(const dlpack::Tensor& view) {
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return true;
  }
  return view.data != nullptr;
}

template <class Shape>
bool has_shape(const dlpack::Tensor& view, const Shape& shape) {
  if (view.rank != int(shape.size())) return false;
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] != shape.begin()[i]) return false;
  }
  return true;
}

// Whether it lies row after row, without gaps. (Of one row the stride says nothing.)
inline bool is_dense(const dlpack::Tensor& view) {
  int64_t stride = 1;
  for (int i = view.rank; i-- > 0; stride *= view.shape[i]) {
    if (view.shape[i] > 1 && view.strides[i] != stride) return false;
  }
  return true;
}

}  // namespace fastcell
