#include "remembered_call.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "c_function.h"

namespace fastcell {
namespace {

py::object called(const py::object& function) { return owned(PyObject_CallNoArgs(function.ptr())); }

bool is_true(PyObject* object) {
  const int found = PyObject_IsTrue(object);
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

// Address and owner.
std::pair<void*, py::object> memory(const py::object& scratch, int64_t bytes) {
  const py::tuple found = scratch(bytes);
  return {as(found[0].cast<Pointer>()), found[1]};
}

PyCFunction as_method(PyObject* (*entry)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry));
}

RememberedCall& inside(PyObject* capsule) {
  return *static_cast<RememberedCall*>(PyCapsule_GetPointer(capsule, nullptr));
}

}  // namespace

py::object RememberedCall::make(const BoundStack& stack, const py::object& exchange_api, Same same,
                                Surroundings surroundings, Python python, py::object packed,
                                std::vector<py::object> templates, py::object reserve,
                                py::list served) {
  const dlpack::ExchangeApi* const api = fastcell::exchange_api(exchange_api);
  if (!api) throw std::invalid_argument("no exchange API that is known");
  if (int(same.weights.size()) != stack.weight_count()) {
    throw std::invalid_argument("remembered_call: wrong number of weights");
  }
  if (int(templates.size()) != stack.states() + !same.single_step) {
    throw std::invalid_argument("remembered_call: wrong number of results");
  }
  auto call = std::make_unique<RememberedCall>(
      stack, *api, std::move(same), std::move(surroundings), std::move(python), std::move(packed),
      std::move(templates), std::move(reserve), std::move(served));
  static PyMethodDef method = {"remembered_call", as_method(&call_entry), METH_FASTCALL, nullptr};
  const py::capsule owner(call.release(), [](void* p) { delete static_cast<RememberedCall*>(p); });
  return owned(PyCFunction_New(&method, owner.ptr()));
}

RememberedCall::RememberedCall(const BoundStack& stack, const dlpack::ExchangeApi& api, Same same,
                               Surroundings surroundings, Python python, py::object packed,
                               std::vector<py::object> templates, py::object reserve,
                               py::list served)
    : stack_(stack),
      api_(&api),
      same_(std::move(same)),
      surroundings_(std::move(surroundings)),
      python_(std::move(python)),
      packed_(std::move(packed)),
      templates_(std::move(templates)),
      reserve_template_(std::move(reserve)),
      served_(std::move(served)),
      tensor_type_(py::type::of(templates_[0])),
      parameter_type_(py::type::of(same_.weights[0].second)) {
  const Stack& s = stack_.stack();
  for (const auto& [dictionary, key] : surroundings_.unchanged) {
    unchanged_.push_back(dictionary[key]);
  }
  for (const auto& [name, weight] : same_.weights) weights_.emplace_back(name, weight, api);
  same_.weights.clear();  // which would keep them alive
  fingerprint_ = fingerprint();

  const int64_t steps = same_.steps, batch = same_.batch, threads = same_.threads;
  time_ = {steps, batch, steps * batch, nullptr};
  const auto rows_of = [&](int64_t features) -> std::vector<int64_t> {
    if (same_.single_step) return {batch, features};
    if (same_.batch_first) return {batch, steps, features};
    return {steps, batch, features};
  };
  x_shape_ = rows_of(s.input);
  y_shape_ = rows_of(s.directions * s.output);
  for (int i = 0; i < stack_.states(); ++i) {
    state_shapes_[i] = {batch, s.state_size(i)};
    if (!same_.single_step) {
      state_shapes_[i].insert(state_shapes_[i].begin(), int64_t(s.layers) * s.directions);
    }
  }
  reserve_shape_ = {time_.rows * stack_.reserve_row_elements()};
  dlpack::Tensor view;
  if (api_->view(packed_.ptr(), &view) != 0) throw py::error_already_set();
  packed_pointer_ = view.data;
  int64_t bytes = 0;
  for (const bool keep : {false, true}) {
    bytes = std::max(bytes, stack_.forward_workspace(steps, batch, time_.rows, keep, false, false,
                                                     false, int(threads)));
  }
  std::tie(workspace_pointer_, workspace_) = memory(python_.scratch, bytes);
  backward_bytes_ = stack_.backward_workspace(steps, batch, time_.rows, false, false, int(threads));
}

PyObject* RememberedCall::call_entry(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "a remembered call takes a dict, an input and states");
    return nullptr;
  }
  return guarded([&] { return inside(self).call(self, args[0], args[1], args[2]); });
}

PyObject* RememberedCall::backward_entry(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "takes what was saved, gradients, and which are needed");
    return nullptr;
  }
  return guarded([&] { return inside(self).backward(args[0], args[1], args[2]); });
}

py::object RememberedCall::call(PyObject* self, PyObject* module, PyObject* input,
                                PyObject* states) {
  static PyObject* const parameters_name = PyUnicode_InternFromString("_parameters");
  if (PyThread_get_thread_ident() != thread_ || !plain(input) || !undisturbed() ||
      !has_attributes(module)) {
    return py::none();
  }
  // (Held: while the kernels run, and wherever Python does, another thread may put other weights
  // in their places.)
  const auto parameters =
      py::reinterpret_borrow<py::object>(PyDict_GetItem(module, parameters_name));
  if (!parameters) return py::none();
  for (const py::object& name : same_.none) {
    if (PyDict_GetItem(parameters.ptr(), name.ptr()) != Py_None) return py::none();
  }
  bool unchanged = true;
  std::vector<py::object> weights;
  weights.reserve(weights_.size());
  for (const RecordedWeight& recorded : weights_) {
    weights.push_back(recorded.in(parameters, *api_));
    if (!weights.back()) return py::none();
    unchanged = unchanged && recorded.unchanged(weights.back());
  }
  dlpack::Tensor x, seen;
  if (!view(input, x_shape_, x) || x.strides[x.rank - 1] != 1) return py::none();
  ForwardCall call = stack_.plain_call(nullptr, workspace_pointer_);
  const Py_ssize_t given = PyTuple_Check(states) ? PyTuple_GET_SIZE(states) : 0;
  if (states != Py_None && given != stack_.states()) return py::none();
  for (Py_ssize_t i = 0; i < given; ++i) {
    PyObject* const state = PyTuple_GET_ITEM(states, i);
    if (!known(state) || !dense(state, state_shapes_[i], seen)) return py::none();
    call.state[i] = seen.data;
  }
  const bool keep = gradients() && wants_gradient(input, states, weights);
  if (keep && python_.apply.is_none()) return py::none();
  if (!unchanged || fingerprint() != fingerprint_) pack_again(input, weights);

  py::object reserve;
  if (keep) {
    reserve = like(reserve_template_.ptr(), seen);
    call.reserve = seen.data;
  }
  const auto results = owned(PyTuple_New(Py_ssize_t(templates_.size())));
  for (size_t i = 0; i < templates_.size(); ++i) {
    py::object one = like(templates_[i].ptr(), seen);
    if (i == 0 && !same_.single_step) {
      call.y = seen.data;
    } else {
      call.final_state[i - !same_.single_step] = seen.data;
    }
    PyTuple_SET_ITEM(results.ptr(), Py_ssize_t(i), one.release().ptr());
  }
  call.time = time_;
  call.schedule = forward_way_(*this, true);
  call.x = rows<const char>(x);
  call.packed = packed_pointer_;  // after the last call into Python, where another may have packed
  stack_.run(call);
  if (PyList_GET_SIZE(served_.ptr()) == 0) served_.append(true);

  py::object found = results;
  if (keep) found = with_graph(self, reserve, results, input, states, weights);
  if (same_.single_step) return found;
  const auto finals = owned(PyTuple_GetSlice(found.ptr(), 1, PyTuple_GET_SIZE(found.ptr())));
  return owned(PyTuple_Pack(2, PyTuple_GET_ITEM(found.ptr(), 0), finals.ptr()));
}

// Weights that are the same tensors, but not the same numbers.
void RememberedCall::pack_again(PyObject* input, const std::vector<py::object>& weights) {
  py::list list;
  for (const py::object& weight : weights) list.append(weight);
  py::object packed = python_.pack(py::handle(input), list);
  dlpack::Tensor view;
  if (api_->view(packed.ptr(), &view) != 0) throw py::error_already_set();
  packed_ = std::move(packed);
  packed_pointer_ = view.data;
  for (size_t i = 0; i < weights.size(); ++i) weights_[i].record_version(weights[i]);
  fingerprint_ = fingerprint();
}

py::object RememberedCall::with_graph(PyObject* self, const py::object& reserve,
                                      const py::object& results, PyObject* input, PyObject* states,
                                      const std::vector<py::object>& weights) const {
  static PyMethodDef method = {"remembered_backward", as_method(&backward_entry), METH_FASTCALL,
                               nullptr};
  const auto run = owned(PyCFunction_New(&method, self));
  const auto made = owned(PyTuple_Pack(2, reserve.ptr(), results.ptr()));
  std::vector<PyObject*> arguments{run.ptr(), made.ptr(), input};
  if (states != Py_None) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(states); ++i) {
      arguments.push_back(PyTuple_GET_ITEM(states, i));
    }
  }
  for (const py::object& weight : weights) arguments.push_back(weight.ptr());
  return owned(
      PyObject_Vectorcall(python_.apply.ptr(), arguments.data(), arguments.size(), nullptr));
}

py::object RememberedCall::backward(PyObject* saved, PyObject* gradients, PyObject* needs) {
  py::object found = backward_or_nothing(saved, gradients, needs);
  if (found) return found;
  return owned(
      PyObject_CallFunctionObjArgs(python_.backward.ptr(), saved, gradients, needs, nullptr));
}

py::object RememberedCall::backward_or_nothing(PyObject* saved, PyObject* gradients,
                                               PyObject* needs) {
  if (!PyTuple_Check(saved) || !PyTuple_Check(gradients) || !PyTuple_Check(needs)) {
    throw std::invalid_argument("a remembered call's backward call takes three tuples");
  }
  const Py_ssize_t weights = Py_ssize_t(weights_.size());
  const Py_ssize_t tensors = PyTuple_GET_SIZE(saved) - 1;  // input, states and weights
  const Py_ssize_t states = tensors - 1 - weights;
  constexpr Py_ssize_t kBefore = 2;  // arguments of apply() before those
  if ((states != 0 && states != stack_.states()) || PyTuple_GET_SIZE(needs) != kBefore + tensors ||
      PyTuple_GET_SIZE(gradients) != Py_ssize_t(templates_.size())) {
    throw std::invalid_argument("a remembered call's backward call: wrong number of tensors");
  }
  static PyObject* const contiguous = PyUnicode_InternFromString("contiguous");
  if (!undisturbed() || this->gradients()) return {};

  const auto item = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(saved, i + 1); };
  BackwardCall call{};
  dlpack::Tensor seen;
  if (!dense(PyTuple_GET_ITEM(saved, 0), reserve_shape_, seen)) return {};
  call.reserve = seen.data;
  if (!known(item(0)) || !dense(item(0), x_shape_, seen)) return {};
  call.x = rows<const char>(seen);
  for (Py_ssize_t i = 0; i < states; ++i) {
    if (!known(item(1 + i)) || !dense(item(1 + i), state_shapes_[i], seen)) return {};
    call.state[i] = seen.data;
  }
  std::vector<const void*> w(weights_.size());
  for (Py_ssize_t i = 0; i < weights; ++i) {
    PyObject* const weight = item(1 + states + i);
    if (!known(weight) || !dense(weight, weights_[i].shape(), seen)) return {};
    w[i] = seen.data;
  }
  const Py_ssize_t outputs = !same_.single_step;
  std::vector<py::object> kept_alive(templates_.size());
  for (Py_ssize_t i = 0; i < Py_ssize_t(templates_.size()); ++i) {
    PyObject* gradient = PyTuple_GET_ITEM(gradients, i);
    if (gradient == Py_None) continue;
    const std::vector<int64_t>& shape = i < outputs ? y_shape_ : state_shapes_[i - outputs];
    if (!plain(gradient) || !view(gradient, shape, seen)) return {};
    if (i < outputs ? seen.strides[seen.rank - 1] != 1 : !is_dense(seen)) {
      // (A sum's is one number, expanded.)
      kept_alive[size_t(i)] = owned(PyObject_CallMethodNoArgs(gradient, contiguous));
      gradient = kept_alive[size_t(i)].ptr();
      if (!plain(gradient) || !view(gradient, shape, seen)) return {};
    }
    if (i < outputs) {
      call.d_y = rows<const char>(seen);
    } else {
      call.d_final[i - outputs] = seen.data;
    }
  }

  std::vector<void*> d_w(weights_.size());
  const auto found = owned(PyTuple_New(kBefore + tensors));
  for (Py_ssize_t i = 0; i < kBefore + tensors; ++i) {
    py::object one = py::none();
    const Py_ssize_t which = i - kBefore;
    if (which >= 0 && is_true(PyTuple_GET_ITEM(needs, i))) {
      one = like(item(which), seen);
      if (which == 0) {
        call.d_x = rows<char>(seen);
      } else if (which <= states) {
        call.d_state[which - 1] = seen.data;
      } else {
        d_w[which - 1 - states] = seen.data;
      }
    }
    PyTuple_SET_ITEM(found.ptr(), i, one.release().ptr());
  }
  const auto [workspace, owner] = memory(python_.scratch, backward_bytes_);
  call.stack = stack_.stack();
  call.time = time_;
  call.schedule = backward_way_(*this, false);
  call.weights = w.data();
  call.d_weights = d_w.data();
  call.workspace = workspace;
  stack_.run(call, same_.threads);
  return found;
}

bool RememberedCall::undisturbed() const {
  for (size_t i = 0; i < unchanged_.size(); ++i) {
    const auto& [dictionary, key] = surroundings_.unchanged[i];
    if (PyDict_GetItem(dictionary.ptr(), key.ptr()) != unchanged_[i].ptr()) return false;
  }
  for (const py::object& function : surroundings_.quiet) {
    if (is_true(called(function).ptr())) return false;
  }
  const long threads = PyLong_AsLong(called(surroundings_.threads).ptr());
  if (threads == -1 && PyErr_Occurred()) throw py::error_already_set();
  return threads == same_.threads;
}

// Whether anything that a gradient could be wanted of wants one; `states`: a tuple or None.
bool RememberedCall::wants_gradient(PyObject* input, PyObject* states,
                                    const std::vector<py::object>& weights) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  const auto wants = [](PyObject* tensor) {
    return is_true(owned(PyObject_GetAttr(tensor, name)).ptr());
  };
  for (const py::object& weight : weights) {
    if (wants(weight.ptr())) return true;
  }
  for (Py_ssize_t i = 0; states != Py_None && i < PyTuple_GET_SIZE(states); ++i) {
    if (wants(PyTuple_GET_ITEM(states, i))) return true;
  }
  return wants(input);
}

bool RememberedCall::gradients() const { return is_true(called(surroundings_.gradients).ptr()); }

bool RememberedCall::has_attributes(PyObject* module) const {
  PyObject *name, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(same_.attributes.ptr(), &at, &name, &value)) {
    if (PyDict_GetItem(module, name) != value) return false;
  }
  for (const py::object& absent : same_.absent) {
    if (PyDict_GetItem(module, absent.ptr())) return false;
  }
  return true;
}

std::uint64_t RememberedCall::fingerprint() const {
  Hash hash;
  for (const RecordedWeight& weight : weights_) weight.add_to(hash);
  return hash.value();
}

bool RememberedCall::view(PyObject* tensor, const std::vector<int64_t>& shape,
                          dlpack::Tensor& out) const {
  return see(tensor, *api_, out) && out.device_type == dlpack::kCpu &&
         out.type_code == dlpack::kFloat && out.type_bits == stack_.item_size() * 8 &&
         has_shape(out, shape) && has_memory(out) && !negated(tensor);
}

py::object RememberedCall::like(PyObject* prototype, dlpack::Tensor& seen) const {
  py::object made = owned(PyObject_Vectorcall(python_.empty_like.ptr(), &prototype, 1, nullptr));
  if (api_->view(made.ptr(), &seen) != 0) throw py::error_already_set();
  return made;
}

template <class T>
RowMap<T> RememberedCall::rows(const dlpack::Tensor& view) const {
  T* const base = static_cast<T*>(view.data);
  if (same_.single_step) return {base, 0, view.strides[0], false};
  return {base, view.strides[same_.batch_first], view.strides[!same_.batch_first], false};
}

const Schedule& RememberedCall::Way::operator()(const RememberedCall& call, bool wavefront) {
  const bool barriers = !crowded();
  if (barriers != barriers_ || schedule_.direction_groups == 0) {
    schedule_ = call.stack_.schedule(call.time_, call.same_.threads, barriers, wavefront);
    barriers_ = barriers;
  }
  return schedule_;
}

}  // namespace fastcell
