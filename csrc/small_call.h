// A call of a layer that was made before, with the same weights and sizes: what Python would check
// and look up again takes longer than a small step, so it is compared here with what it was.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

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

// A weight as it was: the object under its name, its version, and where its numbers lie.
class RecordedWeight {
 public:
  RecordedWeight(py::str name, const py::object& weight, const dlpack::ExchangeApi& api)
      : name_(std::move(name)),
        reference_(py::reinterpret_steal<py::object>(PyWeakref_NewRef(weight.ptr(), nullptr))),
        version_(version(weight.ptr())) {
    if (!reference_) throw py::error_already_set();
    dlpack::Tensor view;
    if (api.view(weight.ptr(), &view) != 0) throw py::error_already_set();
    data_ = view.data;
    shape_.assign(view.shape, view.shape + view.rank);
    for (int64_t n : shape_) count_ *= n;
    item_size_ = view.type_bits / 8;
  }

  const void* data() const { return data_; }
  int64_t count() const { return count_; }
  int64_t item_size() const { return item_size_; }

  // Whether the dictionary still holds that weight, unchanged as far as its version tells.
  bool is_in(PyObject* parameters, const dlpack::ExchangeApi& api) const {
    PyObject* const weight = PyDict_GetItem(parameters, name_.ptr());
    if (!weight || weight != alive() || version(weight) != version_) return false;
    dlpack::Tensor view;
    if (!see(weight, api, view)) return false;
    if (view.data != data_ || view.rank != int(shape_.size())) return false;
    int64_t stride = 1;
    for (int i = view.rank; i-- > 0; stride *= shape_[size_t(i)]) {
      if (view.shape[i] != shape_[size_t(i)] || view.strides[i] != stride) return false;
    }
    return !negated(weight);
  }

  // What the tensor is in memory; false if that cannot be told.
  static bool see(PyObject* object, const dlpack::ExchangeApi& api, dlpack::Tensor& view) {
    if (api.view(object, &view) == 0) return true;
    PyErr_Clear();
    return false;
  }

  // Whether it only says that its numbers are negated, which shows nowhere else.
  static bool negated(PyObject* object) {
    static PyObject* const method = PyUnicode_InternFromString("is_neg");
    const auto found = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, method));
    if (!found) throw py::error_already_set();
    return found.ptr() == Py_True;
  }

 private:
  PyObject* alive() const {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* object = nullptr;
    if (PyWeakref_GetRef(reference_.ptr(), &object) != 1) return nullptr;
    Py_DECREF(object);  // the dictionary holds another reference if it is the same
    return object;
#else
    return PyWeakref_GetObject(reference_.ptr());
#endif
  }

  static long version(PyObject* weight) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(weight, name));
    if (!found) throw py::error_already_set();
    return PyLong_AsLong(found.ptr());
  }

  py::str name_;
  py::object reference_;
  long version_;
  const void* data_;
  std::vector<int64_t> shape_;
  int64_t count_ = 1, item_size_;
};

}  // namespace fastcell
