// A weight as it was at an earlier call: the object under its name, its version, its memory.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "fingerprint.h"
#include "tensor_view.h"

namespace fastcell {

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
    bits_ = view.type_bits;
    shape_.assign(view.shape, view.shape + view.rank);
    for (int64_t n : shape_) count_ *= n;
  }

  // The weight, if the dictionary still holds it in the same memory; else null.
  py::object in(const py::object& parameters, const dlpack::ExchangeApi& api) const {
    const auto weight =
        py::reinterpret_borrow<py::object>(PyDict_GetItem(parameters.ptr(), name_.ptr()));
    dlpack::Tensor view;
    if (!weight || weight.ptr() != alive() || !see(weight.ptr(), api, view)) return {};
    const bool same = view.data == data_ && view.type_code == dlpack::kFloat &&
                      view.type_bits == bits_ && has_shape(view, shape_) && is_dense(view);
    return same && !negated(weight.ptr()) ? weight : py::object();
  }

  // Whether its numbers are those that were recorded, as far as its version tells.
  bool unchanged(const py::object& weight) const { return version(weight.ptr()) == version_; }
  void record_version(const py::object& weight) { version_ = version(weight.ptr()); }
  void add_to(Hash& hash) const { hash.add(data_, count_, bits_ / 8, false); }

  const std::vector<int64_t>& shape() const { return shape_; }

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
  int64_t count_ = 1;
  int bits_;
};

}  // namespace fastcell
