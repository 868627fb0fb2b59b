// A call of a layer or a cell that was made before, at the same sizes: what Python would check and
// look up again takes longer than a small step, so it is compared here with what it was. With
// gradients it leaves a node in torch's graph, whose backward call is here, too.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "bound_stack.h"
#include "recorded_weight.h"

namespace fastcell {

// A call at one shape as a function of Python: of the module's __dict__, the input, and a tuple of
// states or None. It returns (output, [h] or [h, c]), of a cell (h,) or (h, c); or None where this
// is not that call: then nothing was done. Not a class of pybind11, whose way to a method takes a
// tenth of a small step.
class RememberedCall {
 public:
  // What is to be the same in a call.
  struct Same {
    py::dict attributes;             // of the module, and their values
    std::vector<py::object> absent;  // attributes that it must not have
    // Weights by name, in the order in which they are packed.
    std::vector<std::pair<py::str, py::object>> weights;
    std::vector<py::object> none;  // parameters that must be None
    int64_t steps, batch;
    bool batch_first;
    bool single_step;  // a cell: input and states are (B, .), and there is no output beside h
    int threads;
  };
  // What the rest of torch must be like.
  struct Surroundings {
    std::vector<std::pair<py::dict, py::object>> unchanged;  // (dictionary, key): the same values
    std::vector<py::object> quiet;                           // functions that return nothing true
    py::object threads;                                      // () -> how many there are
    py::object gradients;                                    // () -> whether they are on
  };
  // What is done by Python.
  struct Python {
    py::object empty_like;  // tensor -> tensor
    py::object scratch;     // bytes -> (address, owner) of memory of the calling thread
    py::object pack;        // input, list of weights -> their packed form
    // run, (reserve, results), input, *states, *weights -> results with a graph. `run` is the
    // backward call: (reserve, input, *states, *weights), gradients, which are needed -> gradients
    // of apply's arguments. None: calls with gradients are not remembered.
    py::object apply;
    py::object backward;  // the same as `run`, for all that this is not made for
  };

  // packed: the weights; templates: tensors as the results are; reserve: one as what the backward
  // call needs is; served: is no longer empty once a call was this one.
  static py::object make(const BoundStack& stack, const py::object& exchange_api, Same same,
                         Surroundings surroundings, Python python, py::object packed,
                         std::vector<py::object> templates, py::object reserve, py::list served);

  RememberedCall(const BoundStack& stack, const dlpack::ExchangeApi& api, Same same,
                 Surroundings surroundings, Python python, py::object packed,
                 std::vector<py::object> templates, py::object reserve, py::list served);

 private:
  static PyObject* call_entry(PyObject* self, PyObject* const* args, Py_ssize_t count);
  static PyObject* backward_entry(PyObject* self, PyObject* const* args, Py_ssize_t count);

  py::object call(PyObject* self, PyObject* module, PyObject* input, PyObject* states);
  py::object with_graph(PyObject* self, const py::object& reserve, const py::object& results,
                        PyObject* input, PyObject* states,
                        const std::vector<py::object>& weights) const;
  py::object backward(PyObject* saved, PyObject* gradients, PyObject* needs);
  // Null where it is not made for that.
  py::object backward_or_nothing(PyObject* saved, PyObject* gradients, PyObject* needs);

  bool undisturbed() const;
  bool gradients() const;
  static bool wants_gradient(PyObject* input, PyObject* states,
                             const std::vector<py::object>& weights);
  bool has_attributes(PyObject* module) const;
  void pack_again(PyObject* input, const std::vector<py::object>& weights);
  std::uint64_t fingerprint() const;

  bool plain(PyObject* tensor) const { return Py_TYPE(tensor) == type(tensor_type_); }
  bool known(PyObject* tensor) const {
    return plain(tensor) || Py_TYPE(tensor) == type(parameter_type_);
  }
  static PyTypeObject* type(const py::object& t) {
    return reinterpret_cast<PyTypeObject*>(t.ptr());
  }
  bool view(PyObject* tensor, const std::vector<int64_t>& shape, dlpack::Tensor& out) const;
  bool dense(PyObject* tensor, const std::vector<int64_t>& shape, dlpack::Tensor& out) const {
    return view(tensor, shape, out) && is_dense(out);
  }
  // A new tensor, and where its numbers lie.
  py::object like(PyObject* prototype, dlpack::Tensor& seen) const;
  template <class T>
  RowMap<T> rows(const dlpack::Tensor& view) const;

  // One of the two passes' schedule, which depends on whether the machine is crowded.
  class Way {
   public:
    const Schedule& operator()(const RememberedCall& call, bool wavefront);

   private:
    Schedule schedule_{};
    bool barriers_ = true;
  };

  BoundStack stack_;
  const dlpack::ExchangeApi* api_;
  Same same_;
  Surroundings surroundings_;
  Python python_;
  py::object packed_, workspace_;
  std::vector<py::object> templates_;
  py::object reserve_template_;
  py::list served_;
  py::object tensor_type_, parameter_type_;
  std::vector<py::object> unchanged_;  // values, as Surroundings::unchanged
  std::vector<RecordedWeight> weights_;
  std::vector<int64_t> x_shape_, y_shape_, state_shapes_[kMaxStates], reserve_shape_;
  Timeline time_;
  void* workspace_pointer_;
  const void* packed_pointer_;
  int64_t backward_bytes_;
  Way forward_way_, backward_way_;
  std::uint64_t fingerprint_;
  unsigned long thread_ = PyThread_get_thread_ident();  // whose workspace it is
};

}  // namespace fastcell
